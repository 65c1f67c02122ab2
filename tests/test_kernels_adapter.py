"""Each kernel of the bottleneck adapter against float64, inputs between NaN and outputs between canaries."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

from fastlora_kernels import targets
from fastlora_kernels.adapter import kernels
from fastlora_kernels.adapter.backward import adapter_grad_h_weights, adapter_grad_z
from fastlora_kernels.adapter.forward import adapter_down, adapter_forward, adapter_up
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.partials import sum_four_partials
from fastlora_kernels.primitives import DROPPED
from fastlora_kernels.tile import Plan, Shape
from tests.adapter_kernels import BASE, Size, choose, make, partial_sums, rounded, sections
from tests.cases import cases, full
from tests.kernel_harness import Harness, assert_exact

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
AXES = {"m": (1, 31, 32, 77), "h": (1, 31, 32, 77), "d": (1, 16, 17, 33, 64)}
QUICK_SIZES = [BASE, Size(m=1, h=77, d=17), Size(m=77, h=1, d=64), Size(m=32, h=32, d=1)]
MORE_SIZES = [replace(BASE, **{axis: size}) for axis in AXES for size in AXES[axis]]
# every size with one activation, the others at one size
CASES = cases(
    [*((size, "gelu") for size in QUICK_SIZES), (BASE, "relu"), (BASE, "silu")],
    [(size, "gelu") for size in MORE_SIZES],
)
WIDE = [replace(BASE, d=100), replace(BASE, d=256, h=31)]


@pytest.mark.parametrize(("size", "activation"), CASES, ids=str)
def test_adapter_forward(harness: Harness, size: Size, activation: str) -> None:
    tensors = make(harness, size, parameters=torch.float32)
    z, out = harness.output(size.m, size.d), harness.output(size.m, size.h)
    plan = choose(kernels.ADAPTER_FORWARD, size, harness.dtype)
    adapter_forward(
        tensors.h, *tensors.parameters, tensors.residual, None, z, out,
        activation=activation, drop_threshold=1, scale=1.0, plan=plan,
    )  # fmt: skip
    act = ACTIVATIONS[activation]
    operands = rounded(tensors, harness.dtype)
    assert_exact(z, lambda h, wd, bd, *_: h @ wd.t() + bd, *operands)
    assert_exact(out, lambda h, wd, bd, wu, bu, r: r + act(h @ wd.t() + bd) @ wu.t() + bu, *operands)


def test_adapter_forward_without_biases_and_residual(harness: Harness) -> None:
    tensors = make(harness, BASE)
    z, out = harness.output(BASE.m, BASE.d), harness.output(BASE.m, BASE.h)
    adapter_forward(
        tensors.h, tensors.down_weight, None, tensors.up_weight, None, None, None, z, out,
        activation="gelu", drop_threshold=1, scale=1.0,
        plan=choose(kernels.ADAPTER_FORWARD, BASE, harness.dtype),
    )  # fmt: skip
    assert_exact(
        out, lambda h, wd, wu: F.gelu(h @ wd.t()) @ wu.t(), tensors.h, tensors.down_weight, tensors.up_weight
    )


@pytest.mark.parametrize("size", [BASE, *WIDE, Size(m=64, h=32, d=64)], ids=str)
def test_adapter_down_and_up(harness: Harness, size: Size) -> None:
    tensors = make(harness, size, parameters=torch.float32)
    z, active = harness.output(size.m, size.d), harness.output(size.m, size.d)
    out = harness.output(size.m, size.h)
    adapter_down(
        tensors.h, tensors.down_weight, tensors.down_bias, None, z, active,
        activation="silu", drop_threshold=1, scale=1.0,
        plan=choose(kernels.ADAPTER_DOWN, size, harness.dtype),
    )  # fmt: skip
    operands = rounded(tensors, harness.dtype)
    assert_exact(z, lambda h, wd, bd, *_: h @ wd.t() + bd, *operands)
    assert_exact(active, lambda h, wd, bd, *_: F.silu(h @ wd.t() + bd), *operands)
    plan = choose(kernels.ADAPTER_UP, size, harness.dtype)
    adapter_up(active, tensors.up_weight, tensors.up_bias, tensors.residual, out, plan=plan)
    assert_exact(out, lambda a, wu, bu, r: r + a @ wu.t() + bu, active, *operands[3:])


@pytest.mark.parametrize("one_launch", [True, False], ids=["one-launch", "two-launches"])
def test_dropped_elements_are_marked_and_vanish(harness: Harness, one_launch: bool) -> None:
    size, threshold, scale = replace(BASE, m=77, d=33), 20000, 1.5
    tensors, seed = make(harness, size), torch.tensor([77], device=harness.device)
    z, out = harness.output(size.m, size.d), harness.output(size.m, size.h)
    settings: dict[str, Any] = {"activation": "gelu", "drop_threshold": threshold, "scale": scale}
    if one_launch:
        plan = choose(kernels.ADAPTER_FORWARD, size, harness.dtype)
        adapter_forward(tensors.h, *tensors.parameters, None, seed, z, out, **settings, plan=plan)
    else:
        active = harness.output(size.m, size.d)
        plan = choose(kernels.ADAPTER_DOWN, size, harness.dtype)
        down = (tensors.h, tensors.down_weight, tensors.down_bias, seed, z, active)
        adapter_down(*down, **settings, plan=plan)
        adapter_up(
            active,
            tensors.up_weight,
            tensors.up_bias,
            None,
            out,
            plan=choose(kernels.ADAPTER_UP, size, harness.dtype),
        )
    keep = z != torch.tensor(DROPPED).to(z)
    kept, expected = float(keep.float().mean()), 1 - threshold / 65536
    assert abs(kept - expected) < 4 * (expected * (1 - expected) / keep.numel()) ** 0.5
    assert_exact(
        out,
        lambda h, wd, bd, wu, bu: (scale * (F.gelu(h @ wd.t() + bd) * keep)) @ wu.t() + bu,
        tensors.h,
        *tensors.parameters,
    )


@pytest.mark.parametrize(
    ("size", "activation"), [*CASES, (WIDE[0], "gelu"), full((WIDE[1], "gelu"))], ids=str
)
def test_adapter_grad_z(harness: Harness, size: Size, activation: str) -> None:
    dout, z = harness.random(size.m, size.h, padded=True), harness.random(size.m, size.d)
    z[::3, ::2] = DROPPED
    up_weight = harness.random(size.h, size.d)
    dz, active = harness.output(size.m, size.d), harness.output(size.m, size.d)
    plan = choose(kernels.ADAPTER_GRAD_Z, size, harness.dtype)
    adapter_grad_z(dout, z, up_weight, dz, active, activation=activation, scale=1.5, plan=plan)

    def grad_z(dout: Tensor, z: Tensor, up_weight: Tensor) -> Tensor:
        variable = z.clone().requires_grad_()
        return torch.autograd.grad(1.5 * ACTIVATIONS[activation](variable), variable, dout @ up_weight)[0]

    assert_exact(dz, grad_z, dout, z, up_weight)
    assert_exact(active, lambda z: 1.5 * ACTIVATIONS[activation](z), z)
    for vanishing in (dz, active):
        assert torch.equal(vanishing[::3, ::2], torch.zeros_like(vanishing[::3, ::2]))


@pytest.mark.parametrize(
    ("add_input", "splits"), [(True, 2), (False, 1)], ids=["residual-split", "no-residual"]
)
@pytest.mark.parametrize("size", cases([*QUICK_SIZES, WIDE[0]], [*MORE_SIZES, *WIDE[1:]]), ids=str)
def test_adapter_grad_h_weights(harness: Harness, size: Size, add_input: bool, splits: int) -> None:
    dout, h = harness.random(size.m, size.h, padded=True), harness.random(size.m, size.h, padded=True)
    dz, active = harness.random(size.m, size.d), harness.random(size.m, size.d)
    down_weight = harness.random(size.d, size.h)
    dh, partial = harness.output(size.m, size.h), partial_sums(harness, size, splits)
    plan = choose(kernels.ADAPTER_GRAD_H_WEIGHTS, size, harness.dtype, splits)
    adapter_grad_h_weights(dout, h, dz, active, down_weight, dh, partial, add_input=add_input, plan=plan)
    assert_exact(dh, lambda dz, w, dout: dz @ w + (dout if add_input else 0), dz, down_weight, dout)
    d_up, d_down, d_up_bias, d_down_bias = sections(partial.sum(0), size)
    assert_exact(d_up, lambda dout, active: dout.t() @ active, dout, active)
    assert_exact(d_down, lambda dz, h: dz.t() @ h, dz, h)
    _assert_column_sums(d_up_bias, dout)
    _assert_column_sums(d_down_bias, dz)


def test_parameter_gradients_without_dh(harness: Harness) -> None:
    dout, h = (harness.random(BASE.m, BASE.h) for _ in range(2))
    dz, active = (harness.random(BASE.m, BASE.d) for _ in range(2))
    partial = partial_sums(harness, BASE, 1)
    plan = choose(kernels.ADAPTER_GRAD_H_WEIGHTS, BASE, harness.dtype)
    unused = harness.random(BASE.d, BASE.h)
    adapter_grad_h_weights(dout, h, dz, active, unused, None, partial, add_input=True, plan=plan)
    assert_exact(sections(partial[0], BASE)[0], lambda dout, active: dout.t() @ active, dout, active)


@pytest.mark.parametrize("parts", [1, 5])
def test_sum_four_partials(harness: Harness, parts: int) -> None:
    shapes = [(40, 30), (30, 40), (40,), (1,)]
    outs: Any = tuple(harness.output(*shape) for shape in shapes)
    sizes = [out.numel() for out in outs]
    partial = harness.random(parts, sum(sizes), dtype=torch.float32)
    sum_four_partials(partial, *outs)
    in_order = torch.zeros(sum(sizes), device=harness.device)
    for part in partial:
        in_order = in_order + part
    assert torch.equal(torch.cat([out.flatten() for out in outs]), in_order.to(harness.dtype))


@pytest.mark.parametrize("target", cases(["sm_90"], ["sm_80", "sm_100", "gfx942"]))
@pytest.mark.parametrize("d", [16, 64, 128, 256])
def test_pinned_tiles_compute_the_same(target: str, d: int, kernel_device: torch.device) -> None:
    """The large tiles that GPUs get, with ragged rows and hidden columns."""
    harness, size = Harness(torch.float16, kernel_device), Size(m=150, h=144, d=d)
    gpu = targets.TARGETS[target]

    def plan(kernel: Kernel) -> Plan:
        return plans.choose(kernel, Shape(size.m, size.h, size.h, size.d), harness.dtype, gpu)

    tensors, z = make(harness, size), harness.output(size.m, size.d)
    out, active = harness.output(size.m, size.h), harness.output(size.m, size.d)
    settings: dict[str, Any] = {"activation": "gelu", "drop_threshold": 1, "scale": 1.0}
    act = (tensors.h, *tensors.parameters)
    if kernels.one_launch(d):
        adapter_forward(*act, tensors.residual, None, z, out, **settings, plan=plan(kernels.ADAPTER_FORWARD))
    else:
        down = (tensors.h, tensors.down_weight, tensors.down_bias, None, z, active)
        adapter_down(*down, **settings, plan=plan(kernels.ADAPTER_DOWN))
        adapter_up(
            active, tensors.up_weight, tensors.up_bias, tensors.residual, out, plan=plan(kernels.ADAPTER_UP)
        )
    operands = rounded(tensors, harness.dtype)
    assert_exact(out, lambda h, wd, bd, wu, bu, r: r + F.gelu(h @ wd.t() + bd) @ wu.t() + bu, *operands)

    dout, dz = harness.random(size.m, size.h), harness.random(size.m, size.d)
    backward = plan(kernels.ADAPTER_GRAD_H_WEIGHTS)
    dh, partial = harness.output(size.m, size.h), partial_sums(harness, size, backward.splits)
    source = harness.random(size.m, size.d)
    arguments = (dout, tensors.h, dz, source, tensors.down_weight, dh, partial)
    adapter_grad_h_weights(*arguments, add_input=True, plan=backward)
    assert_exact(dh, lambda dz, w, dout: dz @ w + dout, dz, tensors.down_weight, dout)
    d_up, d_down, *_ = sections(partial.sum(0), size)
    assert_exact(d_up, lambda dout, source: dout.t() @ source, dout, source)
    assert_exact(d_down, lambda dz, h: dz.t() @ h, dz, tensors.h)
    harness.assert_margins_untouched()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_reaches_the_output(activation: str, kernel_device: torch.device) -> None:
    harness = Harness(torch.float32, kernel_device)
    tensors = make(harness, BASE)
    tensors.h[3, 0] = float("nan")
    z, out = harness.output(BASE.m, BASE.d), harness.output(BASE.m, BASE.h)
    plan = choose(kernels.ADAPTER_FORWARD, BASE, harness.dtype)
    settings: dict[str, Any] = {"activation": activation, "drop_threshold": 1, "scale": 1.0}
    adapter_forward(tensors.h, *tensors.parameters, None, None, z, out, **settings, plan=plan)
    assert out[3].isnan().all()
    assert not out[4].isnan().any()


def test_row_offsets_pass_two_to_the_31(kernel_device: torch.device) -> None:
    """Rows so far apart that a 32-bit offset would wrap around; only the pages that are touched exist."""
    rows, hidden, d, stride = 3, 40, 4, 2**30 + 8
    far = torch.empty(2 * stride + hidden, dtype=torch.float16, device=kernel_device)
    h = far.as_strided((rows, hidden), (stride, 1))
    h.copy_(torch.randn(rows, hidden))
    down, up = torch.randn(d, hidden).to(h), torch.randn(hidden, d).to(h)
    z, out = torch.empty(rows, d).to(h), torch.empty(rows, hidden).to(h)
    plan = choose(kernels.ADAPTER_FORWARD, Size(rows, hidden, d), h.dtype)
    settings: dict[str, Any] = {"activation": "relu", "drop_threshold": 1, "scale": 1.0}
    adapter_forward(h, down, None, up, None, h, None, z, out, **settings, plan=plan)
    assert_exact(out, lambda h, down, up: h + F.relu(h @ down.t()) @ up.t(), h, down, up)


def _assert_column_sums(sums: Tensor, summands: Tensor) -> None:
    """Within one fp32 rounding of the absolute sum: eager's error of a single number may be zero by luck."""
    error = (sums.double() - summands.double().sum(0)).abs()
    assert (error <= torch.finfo(torch.float32).eps * summands.double().abs().sum(0)).all()
