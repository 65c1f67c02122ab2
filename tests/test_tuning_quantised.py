"""``tune`` of layers over quantised weights: paths of their own, checked against the stored bytes."""

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora.functional import lora_linear
from fastlora.ops import kernel_paths
from fastlora.ops.weights import decode_triton
from fastlora.tuning import search
from fastlora.tuning.candidates import choices, draw, run_eager
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.quant import kernels as quantised
from fastlora_kernels.tile import Tile
from tests.cases import cases
from tests.tuning_models import CALL, GPU, SMALL_CARD, device, pretend, record
from tests.tuning_timers import counting_timer

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("weight", "dropout"),
    cases(
        [("nf4", 0.0), ("int8", 0.1)],
        [("nf4", 0.1), ("int8", 0.0), *product(("fp8", "fp8-rows"), (0.0, 0.1))],
    ),
)
def test_quantised_layers_are_timed_as_they_run(weight: Any, dropout: float) -> None:
    """By paths over dense rows and by decoding, of 4 bits without dropout; eager would keep W dense."""
    call = replace(CALL, inputs=64, dropout=dropout, weight=weight)
    told: list[str] = []
    with fastlora.use_backend("triton"):
        found, left_out = search.tune_call(call, device(), counting_timer(1, 1), told.append)
    assert left_out == []
    assert found is not None
    assert (found.weight, "eager" in told, [*found.microseconds["step"]]) == (weight, False, ["fused"])
    decoding = [name for name in found.microseconds["forward"] if name.startswith("decode")]
    without = {"nf4": 2, "fp8": 0}.get(weight, 3)
    assert len(decoding) == (0 if weight == "nf4" and dropout else without)
    assert not any(name.startswith("decode") for name in found.microseconds["backward"])
    assert tuned.fits(found, SMALL_CARD)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("weight", ["int8", "fp8-rows"])
def test_the_truth_is_of_bytes_as_they_are_stored(weight: Any) -> None:
    """For a path that decodes them: dense in 16 bits, as others multiply them, they were rounded."""
    call = replace(CALL, inputs=64, weight=weight)
    drawn, truths = search._prepared(call, device())
    assert drawn.stored is not None
    stored, dense = (drawn.to(torch.float64, unrounded=unrounded) for unrounded in (True, False))
    assert torch.equal(stored.weight, drawn.stored.dense(torch.float64))
    assert torch.equal(dense.weight, drawn.weight.double())
    for unrounded, tensors in ((True, stored), (False, dense)):
        assert torch.equal(truths[unrounded].exact[0], run_eager(tensors)[0])
    # eager's own error is then that of rounding W, too
    assert truths[True].allowed[0] > truths[False].allowed[0]


@pytest.mark.parametrize("weight", [None, "nf4", "int8", "fp8", "fp8-rows"])
@pytest.mark.usefixtures("card")
def test_which_paths_round_the_weight(weight: Any) -> None:
    call = replace(CALL, inputs=64, weight=weight)
    drawn = draw(call, device())
    found = {choice.path for choice in choices("forward", call, device()) if drawn.unrounded_by(choice)}
    assert found == ({"decode"} if weight in ("int8", "fp8-rows") else set())


@pytest.mark.usefixtures("card")
def test_a_weight_beyond_the_workspace_has_paths_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "WORKSPACE_BYTES", CALL.outputs * 64)
    call = replace(CALL, inputs=64, weight="nf4")
    for part in get_args(Pass):
        (first, *others) = choices(part, call, device())
        assert first == Choice("split")
        assert {each.path for each in others} == ({"decode"} if part == "forward" else set())


@pytest.mark.usefixtures("card")
def test_a_quantised_layer_takes_what_was_measured_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    call = replace(CALL, inputs=64, weight="nf4")
    won = Choice("decode", Tile(16, 32, 64, 32, warps=4, stages=4))
    own = replace(record(call), forward=won, weight="nf4")
    dense = replace(own, forward=Choice("single"), weight=None)
    tuned.pin(GPU, [own, dense])

    def taken(**more: Any) -> Choice:
        return kernel_paths.choose("forward", call.shape, torch.float16, device(), dropping=False, **more)

    assert taken(stored="nf4", decodable=True) == won
    assert taken() == Choice("single")
    # blocks that run over the ends of rows: neither that one nor the dense one's
    tuned.pin(GPU, [own, replace(dense, forward=Choice("epilogue"))])
    predicted = taken(stored="other")
    assert taken(stored="nf4") == taken(stored="int8") == predicted != Choice("epilogue")
    # unless a path over dense rows was timed beside it
    timed = {
        "forward": {"decode 16×32×64, 32": 1.0, "split 64×64×32, 16": 3.0, "epilogue": 2.0, "other": 0.5}
    }
    tuned.pin(GPU, [replace(own, microseconds=timed)])
    assert taken(stored="nf4") == Choice("epilogue")
    assert taken(stored="nf4", decodable=True) == won
    tuned.pin(GPU, [own])
    launched: list[Any] = []
    run = decode_triton._four_bits

    def watched(*tensors: Tensor, **settings: Any) -> None:
        launched.append(settings["tile"])
        run(*tensors, **settings)

    monkeypatch.setattr(decode_triton, "_four_bits", watched)
    with fastlora.use_backend("triton"):
        t = draw(call, device())
        assert t.stored is not None
        y = lora_linear(t.x, t.stored, t.bias, t.lora_A, t.lora_B, scaling=1.0)
        expected = lora_linear(t.x, t.weight, t.bias, t.lora_A, t.lora_B, scaling=1.0)
    assert launched == [won.tile]
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
