"""What is predicted of layers that share their input, and the path that follows from it."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch

from fastlora_kernels import targets
from fastlora_kernels.choose.call import Call
from fastlora_kernels.choose.explain import explain_shared
from fastlora_kernels.choose.shared import choose_shared_path, joins_ranks, shared_candidates
from fastlora_kernels.choose.shared_forward import choose_shared_forward_path, shared_forward_candidates
from fastlora_kernels.lora.kernels import LORA_ADD, LORA_DOWN, LORA_GRAD_A
from fastlora_kernels.shared.kernels import SHARED_DOWN
from fastlora_kernels.tile import Shape

H100 = targets.find_card("H100")
# outputs of query, key and value with eight heads for key and value, and of gate and up: Llama-8B
QKV, GATE_UP = (4096, 1024, 1024), (14336, 14336)


def shapes(outputs: Sequence[int], *, m: int = 8192, k: int = 4096, r: int = 16) -> tuple[Shape, ...]:
    return tuple(Shape(m, n, k, r) for n in outputs)


def calls(outputs: Sequence[int], *, card: str = "H100", dropping: bool = False, m: int = 8192) -> list[Call]:
    target = targets.find_card(card)
    return [Call(shape, torch.bfloat16, target, dropping) for shape in shapes(outputs, m=m)]


def predicted_gain(*, dropout: float = 0.0) -> float:
    """Both passes of layers that are computed one by one, and their dX added, over what is chosen here."""
    found = explain_shared(shapes(QKV), torch.bfloat16, H100, dropout=dropout)
    assert found.apart is not None
    return found.apart.predicted_us / found.predicted_us


def test_query_key_and_value_gain_on_an_h100() -> None:
    """Over three layers of ours and autograd's two adds, as ``kernels/README.md`` has it. Predicted."""
    assert predicted_gain() == pytest.approx(1.20, abs=0.005)
    assert predicted_gain(dropout=0.1) == pytest.approx(1.10, abs=0.005)


@pytest.mark.parametrize(("card", "outputs"), [("RTX 4090", (11008,) * 2), ("L4", (4096,) * 3)])
def test_nothing_is_faster_than_the_ceiling(card: str, outputs: Sequence[int]) -> None:
    """Of few rows the frozen layers one by one may be faster than one with all outputs."""
    found = explain_shared(shapes(outputs, m=16), torch.bfloat16, targets.find_card(card))
    assert found.overhead >= 1


@pytest.mark.parametrize(
    "layers", [shapes((64,)), (*shapes((64,)), *shapes((64,), m=100)), (*shapes((64,)), *shapes((64,), k=64))]
)
def test_only_layers_on_one_input_are_explained(layers: tuple[Shape, ...]) -> None:
    with pytest.raises(ValueError, match="at least two layers of the same rows and inputs, got"):
        explain_shared(layers, torch.bfloat16, H100)


@pytest.mark.parametrize(
    ("outputs", "card", "dropping", "path"),
    [
        (QKV, "H100", False, "shared"),
        (QKV, "H100", True, "shared"),
        (QKV, "B200", False, "epilogue"),
        (QKV, "A100", False, "epilogue"),
        # their main loops are long: each alone has larger tiles, read by descriptors
        (GATE_UP, "H100", False, "separate"),
        ((4096, 0), "H100", False, "separate"),
    ],
)
def test_path(outputs: Sequence[int], card: str, dropping: bool, path: str) -> None:
    target = targets.find_card(card)
    assert choose_shared_path(shapes(outputs), torch.bfloat16, target, dropping=dropping) == path


@pytest.mark.parametrize(
    ("layers", "dtype", "told"),
    [
        (shapes(QKV), torch.float32, {"shared": "IEEE"}),
        (shapes((4096,) * 4), torch.bfloat16, {"shared": "2 to 3 layers", "epilogue": "2 to 3 layers"}),
        (shapes((4096,)), torch.bfloat16, {"shared": "2 to 3 layers", "epilogue": "2 to 3 layers"}),
        ((*shapes((64,)), *shapes((64,), r=24)), torch.bfloat16, {"shared": "ranks", "epilogue": "ranks"}),
        ((*shapes((64,)), Shape(8192, 50, 4096, 16, aligned=False)), torch.bfloat16, {"shared": "rows"}),
    ],
    ids=["float32", "four", "one", "rank 24", "unaligned"],
)
def test_what_cannot_serve_says_why(
    layers: tuple[Shape, ...], dtype: torch.dtype, told: dict[str, str]
) -> None:
    refused = {
        each.path: each.refused for each in shared_candidates([Call(s, dtype, H100, False) for s in layers])
    }
    assert all(why in refused[path] for path, why in told.items())
    assert not refused["separate"]


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("path", ["shared", "epilogue"])
def test_every_path_has_the_flops_of_the_formula(path: str, dropping: bool) -> None:
    of = calls((1024, 512, 512), dropping=dropping)
    found = {each.path: sum(launch.flops for launch in each.launches) for each in shared_candidates(of)}
    # the kernel takes 32 ranks at a time
    assert found[path] == pytest.approx(found["separate"], rel=0.03)


def test_without_dropout_x_is_read_once_for_every_gradient_of_an_a() -> None:
    for dropping, launches in ((False, 1), (True, 3)):
        assert joins_ranks(shapes(QKV), dropping=dropping) == (launches == 1)
        for each in shared_candidates(calls(QKV, dropping=dropping)):
            names = [launch.name for launch in each.launches]
            if each.path != "separate":
                assert names.count(LORA_GRAD_A.name) == launches
                assert names.count(LORA_ADD.name) == (launches if each.path == "epilogue" else 0)
    # one of 24 could not be read in wide words
    assert not joins_ranks(shapes(QKV, r=8), dropping=False)
    assert joins_ranks(shapes((64, 64), r=8), dropping=False)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_without_kernels_library_products_are_summed(dropout: float) -> None:
    """Of layers without kernels all run by library products; one with kernels leaves them apart."""
    layers = shapes(QKV, r=24)
    found = explain_shared(layers, torch.bfloat16, H100, dropout=dropout)
    assert (found.forward.path, found.backward.path) == ("separate", "library")
    assert found.apart is not None
    assert found.flops == pytest.approx(found.apart.flops)
    x_bytes = 2 * layers[0].m * layers[0].k
    assert found.apart.bytes - found.bytes >= 2 * 2 * x_bytes
    mixed = explain_shared((*layers[:2], *shapes((1024,))), torch.bfloat16, H100, dropout=dropout)
    assert mixed.path == "separate"
    # whoever runs kernels, or times what they may do, has no such path
    of = [Call(shape, torch.bfloat16, H100, dropout > 0) for shape in layers]
    assert [each.path for each in shared_candidates(of) if not each.refused] == ["separate"]


@pytest.mark.parametrize(
    ("outputs", "card", "m", "dropping", "path"),
    [
        (QKV, "H100", 8192, False, "shared"),
        (QKV, "RTX 4090", 4096, True, "shared"),
        # each alone is one launch, its S in the main loop
        (QKV, "H100", 512, False, "separate"),
        (QKV, "H100", 512, True, "shared"),
        ((4096, 0), "H100", 512, True, "separate"),
    ],
)
def test_forward_path(outputs: Sequence[int], card: str, m: int, dropping: bool, path: str) -> None:
    of = (shapes(outputs, m=m), torch.bfloat16, targets.find_card(card))
    assert choose_shared_forward_path(*of, dropping=dropping) == path


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("dropping", [False, True])
def test_s_of_all_is_what_each_computes_from_fewer_bytes(dropping: bool, rank: int) -> None:
    of = [Call(shape, torch.bfloat16, H100, dropping) for shape in shapes(QKV, r=rank)]
    shared, separate = shared_forward_candidates(of)
    (down,) = (launch for launch in shared.launches if launch.name == SHARED_DOWN.name)
    assert down.flops == sum(2 * call.shape.m * call.shape.k * rank for call in of)
    # 32 ranks of each at a time, and every mask is written once
    x, masks, s = of[0].x_bytes, sum(call.mask_bytes for call in of), sum(call.s_bytes for call in of)
    assert down.bytes == (rank // 32 or 1) * x + masks + s
    assert LORA_DOWN.name not in {launch.name for launch in shared.launches}
    if dropping:
        names = [launch.name for launch in separate.launches if launch.name != LORA_DOWN.name]
        assert [launch.name for launch in shared.launches if launch is not down] == names


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (shapes((4096,) * 4), "2 to 3 layers"),
        (shapes((4096,)), "2 to 3 layers"),
        ((*shapes((64,)), *shapes((64,), r=24)), "ranks"),
        ((*shapes((64,)), Shape(8192, 50, 4096, 16, aligned=False)), "rows"),
    ],
    ids=["four", "one", "rank 24", "unaligned"],
)
def test_what_reads_x_for_each_layer_says_why(layers: tuple[Shape, ...], told: str) -> None:
    shared, separate = shared_forward_candidates([Call(s, torch.bfloat16, H100, False) for s in layers])
    assert told in shared.refused
    assert not separate.refused


def test_every_rank_takes_a_tile_that_the_compile_gate_compiles() -> None:
    for rank in range(1, 129):
        assert_compiled(rank)


def assert_compiled(rank: int) -> None:
    alike = [each for each in SHARED_DOWN.ranks if (each % 16 == 0) == (rank % 16 == 0)]
    for target, dtype, aligned in product(
        targets.TARGETS.values(), (torch.bfloat16, torch.float32), (True, False)
    ):
        compiled = [tile for each in alike for tile in SHARED_DOWN.tiles(each, dtype, target, aligned)]
        assert set(SHARED_DOWN.tiles(rank, dtype, target, aligned)) <= set(compiled)
