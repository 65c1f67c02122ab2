"""The whole adapter op on every backend: as exact as eager, for every layout, dtype and size; dropout."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import reference
from fastlora.functional import adapter
from fastlora.ops.adapter import AdapterFunction
from fastlora.ops.decide import Decision
from fastlora.ops.keep_mask import keep_probability
from tests.adapter_yardstick import Case, assert_as_exact_as_eager, eager, make_case, outputs_and_gradients
from tests.cases import cases
from tests.lora_yardstick import DTYPES, EACH_DTYPE

# rows, hidden size, bottleneck
SIZES = [(33, 41, 5), (1, 64, 16), (65, 48, 1), (31, 63, 70)]
MORE_SIZES = [(64, 1, 8), (130, 96, 64), (20, 48, 256)]
# every activation is 0 there, so the backends store it where dropout struck
FAR_BELOW = -20000.0


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        pytest.importorskip("triton", reason="the triton backend needs Triton")
        request.getfixturevalue("kernel_device")
    with fastlora.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("kernel_device") if backend == "triton" else torch.device("cpu")


def run(case: Case, **options: Any) -> list[Tensor]:
    return outputs_and_gradients(functools.partial(adapter, **options), case)


def run_with_dropout(case: Case, backend: Any, dropout: float) -> list[Tensor]:
    """Like :func:`run`, recording in the case the mask that the op drew."""
    seed = torch.tensor([5], device=case.h.device) if dropout else None

    def forward(*args: Tensor, residual: Tensor | str, activation: str) -> Tensor:
        separate = None if isinstance(residual, str) else residual
        out: Tensor
        settings = (separate is None, activation, dropout, Decision(backend))
        out, z = AdapterFunction.apply(*args, separate, seed, *settings)
        if dropout:
            case.keep = (z > FAR_BELOW).view(*args[0].shape[:-1], z.shape[1])
        case.keep_probability = keep_probability(dropout)
        return out

    return outputs_and_gradients(forward, case)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
@EACH_DTYPE
@pytest.mark.parametrize(
    ("size", "activation"),
    cases(
        [*((size, "gelu") for size in SIZES), (SIZES[0], "relu"), (SIZES[0], "silu")],
        [(size, "gelu") for size in MORE_SIZES],
    ),
    ids=str,
)
def test_as_exact_as_eager(
    backend: str,
    device: torch.device,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    activation: str,
    dropout: float,
) -> None:
    case = make_case(*size, dtype, activation=activation, device=device)
    assert_as_exact_as_eager(lambda case: run_with_dropout(case, backend, dropout), case)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", cases([SIZES[0]], [pytest.param(MORE_SIZES[-1])]), ids=str)
def test_residual_of_its_own(
    backend: str, device: torch.device, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """The parallel form: the output of another layer is added, and gets the gradient as it is."""
    case = make_case(*size, dtype, separate_residual=True, device=device)
    assert_as_exact_as_eager(run, case)
    assert torch.equal(run(case)[-1], case.dout)


def test_no_residual(backend: str, device: torch.device) -> None:
    case = make_case(33, 41, 5, torch.float32, device=device)
    torch.testing.assert_close(
        adapter(case.h, *case.parameters, residual=None), run(case)[0] - case.h, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 100])
def test_parameters_in_another_dtype(
    backend: str, device: torch.device, size: int, dtype: torch.dtype
) -> None:
    """fp32 parameters beside a 16-bit layer: rounded once, their gradients back in fp32."""
    case = make_case(70, 48, size, dtype, parameters=torch.float32, device=device)
    assert_as_exact_as_eager(run, case)


@pytest.mark.parametrize("missing", [(1,), (3,), (1, 3)], ids=["no b_d", "no b_u", "none"])
@pytest.mark.parametrize("size", [5, 100])
def test_without_biases(backend: str, device: torch.device, missing: tuple[int, ...], size: int) -> None:
    case = make_case(33, 41, size, torch.float32, device=device)
    given = [None if i in missing else p.requires_grad_() for i, p in enumerate(case.parameters)]
    out, expected = adapter(case.h, *given), reference.adapter(case.h, *given)  # type: ignore[arg-type]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    wanted = [p for p in given if p is not None]
    gradients = (torch.autograd.grad(o, wanted, case.dout) for o in (out, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(41,), (7, 41), (2, 3, 41), (2, 3, 4, 41), (2, 1, 3, 2, 41)], ids=str)
def test_one_to_five_dimensions(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    case = make_case(1, 41, 5, torch.float32, device=device)
    case.h, case.dout = torch.randn(shape, device=device), torch.randn(shape, device=device)
    assert_as_exact_as_eager(run, case)


@pytest.mark.parametrize("layout", ["row slice", "column slice", "transposed", "permuted", "expanded"])
def test_strides(backend: str, device: torch.device, layout: str) -> None:
    case = make_case(12, 41, 5, torch.float32, device=device)
    wide = torch.randn(3, 8, 41 + 9, device=device)
    case.h = {
        "row slice": wide[:, 2:6, :41],
        "column slice": wide[:, ::2, 3:44],
        "transposed": torch.randn(3, 41, 4, device=device).transpose(1, 2),
        "permuted": torch.randn(4, 3, 41, device=device).permute(1, 0, 2),
        "expanded": torch.randn(1, 1, 41, device=device).expand(3, 4, 41),
    }[layout]
    case.residual = torch.randn(3, 41, 4, device=device).transpose(1, 2)
    case.parameters[0] = torch.randn(41, 5, device=device).t()
    case.parameters[2] = torch.randn(5, 41, device=device).t()
    case.dout = torch.randn(41, 4, 3, device=device).permute(2, 1, 0)
    assert_as_exact_as_eager(run, case)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)], ids=str)
def test_no_rows(backend: str, device: torch.device, shape: tuple[int, ...], dropout: float) -> None:
    case = make_case(1, 6, 2, torch.float32, device=device)
    case.h, case.dout = torch.randn(shape, device=device), torch.randn(shape, device=device)
    for value, expected in zip(run(case, dropout=dropout), eager(case), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("size", cases([1, 17, 65], [2, 15, 16, 64, 128, 255, 256]))
def test_bottlenecks(backend: str, device: torch.device, size: int) -> None:
    assert_as_exact_as_eager(run, make_case(40, 60, size, torch.float32, device=device))


def test_wide_bottlenecks_run_on_library_products() -> None:
    case = make_case(20, 30, 1024, torch.float32)
    assert_as_exact_as_eager(run, case)
    with (
        fastlora.use_backend("triton"),
        pytest.raises(ValueError, match=r"bottlenecks up to 256, got 1024; use fastlora\.set_backend"),
    ):
        run(case)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_zero_up_projection_changes_nothing_bit_for_bit(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    case = make_case(64, 48, 80, dtype, device=device)
    for parameter in case.parameters[2:]:
        parameter.zero_()
    assert torch.equal(run(case)[0], case.h)
    assert torch.equal(adapter(case.h, *case.parameters, dropout=0.5), case.h)


@pytest.mark.parametrize(
    ("target", "size", "dropout"),
    cases(
        [("sm_90", 16, 0.0), ("sm_90", 256, 0.3)],
        [
            *[
                ("sm_80", 64, 0.3),
                ("gfx942", 128, 0.0),
                ("sm_80", 16, 0.0),
                ("sm_80", 128, 0.0),
                ("sm_80", 256, 0.3),
                ("sm_90", 64, 0.3),
            ],
            *[("sm_90", 128, 0.0), ("gfx942", 16, 0.0), ("gfx942", 64, 0.3), ("gfx942", 256, 0.3)],
        ],
    ),
)
def test_plans_of_real_gpus(
    target: str, size: int, dropout: float, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole op with the tiles and splits that a GPU gets, through the interpreter where there is none."""
    targets = pytest.importorskip("fastlora_kernels.targets")
    monkeypatch.setattr(targets, "detect", lambda _: targets.TARGETS[target])
    case = make_case(300, 144, size, torch.bfloat16, parameters=torch.float32, device=kernel_device)
    with fastlora.use_backend("triton"):
        assert_as_exact_as_eager(lambda case: run_with_dropout(case, "triton", dropout), case)


@pytest.mark.parametrize(
    ("size", "dtype", "expected"),
    [
        ((64, 48, 64), torch.bfloat16, "triton"),
        ((8, 48, 64), torch.bfloat16, "triton"),
        ((64, 48, 64), torch.float32, "torch"),
        ((64, 47, 64), torch.bfloat16, "torch"),
        ((64, 48, 20), torch.bfloat16, "torch"),
        ((64, 48, 272), torch.bfloat16, "torch"),
    ],
    ids=["kernels", "few rows", "fp32", "unaligned", "odd bottleneck", "too wide"],
)
def test_auto_follows_the_plan(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    expected: str,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = pytest.importorskip("fastlora_kernels.targets")
    monkeypatch.setattr(targets, "detect", lambda _: targets.TARGETS["sm_90"])
    monkeypatch.setattr("fastlora._core.backend._automatic", lambda device, dtype: "triton")
    used: list[str] = []
    apply = AdapterFunction.apply

    def spy(*args: Any) -> Any:
        used.append(args[-1].backend)
        return apply(*args)

    monkeypatch.setattr(AdapterFunction, "apply", spy)
    run(make_case(*size, dtype, device=kernel_device))
    assert used == [expected]


@pytest.mark.parametrize("dropout", cases([0.1], [0.001, 0.9]))
def test_keep_rate(backend: str, device: torch.device, dropout: float) -> None:
    case = make_case(300, 16, 200, torch.float32, device=device)
    run_with_dropout(case, backend, dropout)
    assert case.keep is not None
    kept = case.keep.double()
    deviation = (dropout * (1 - dropout) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - keep_probability(dropout)) < 5 * deviation
    neighbours = ((kept - kept.mean())[:, 1:] * (kept - kept.mean())[:, :-1]).mean()
    assert abs(neighbours) < 6 * dropout * (1 - dropout) * kept.numel() ** -0.5


def test_seed_repeats_the_mask_and_eval_has_none(backend: str, device: torch.device) -> None:
    case = make_case(40, 50, 20, torch.float32, device=device)

    def call(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        return adapter(case.h, *case.parameters, dropout=0.3, **options)

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
    assert torch.equal(call(1, training=False), adapter(case.h, *case.parameters))
    generators = [torch.Generator(device).manual_seed(9) for _ in range(2)]
    state = torch.get_rng_state()
    first, second = (adapter(case.h, *case.parameters, dropout=0.3, generator=g) for g in generators)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputes_the_same_bits(backend: str, device: torch.device, reentrant: bool) -> None:
    case = make_case(40, 50, 20, torch.float32, device=device)
    inputs = [t.requires_grad_() for t in case.inputs]

    def call(*args: Tensor) -> Tensor:
        return adapter(*args, dropout=0.3)

    results = []
    for wrapped in (False, True):
        torch.manual_seed(7)
        out = checkpoint(call, *inputs, use_reentrant=reentrant) if wrapped else call(*inputs)
        assert isinstance(out, Tensor)
        for tensor in inputs:
            tensor.grad = None
        # the reentrant checkpoint only works with .backward()
        out.square().sum().backward()
        results.append((out, *(tensor.grad for tensor in inputs)))
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))
