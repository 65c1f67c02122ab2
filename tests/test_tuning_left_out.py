"""What ``tune`` leaves out: candidates that fail or err, against a truth of few rows."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from triton.runtime.errors import OutOfResources

from fastlora.cli import _tuned
from fastlora.ops import lora_triton
from fastlora.tuning import search, truth
from fastlora.tuning.candidates import draw, run_eager
from fastlora_kernels.choose import tuned
from fastlora_kernels.lora.forward import lora_forward
from tests.cases import cases
from tests.tuning_models import CALL, device, pretend
from tests.tuning_timers import counting_timer, tuned_call

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def raising(error: Exception) -> Callable[..., Any]:
    def run(*arguments: Any, **more: Any) -> Any:
        raise error

    return run


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("error", "wrong"),
    cases(
        [
            (RuntimeError("Triton Error [CUDA]: invalid argument"), True),
            (OutOfResources(300_000, 232_448, "shared memory"), False),
        ],
        [
            (SyntaxError("at 3:4: " + "source " * 200 + "no such name"), True),
            (torch.OutOfMemoryError("CUDA out of memory"), False),
        ],
    ),
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_candidate_that_fails_is_left_out(
    error: Exception, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_triton, "lora_forward_single", raising(error))
    found, left_out = tuned_call(CALL, counting_timer(1, 1))
    assert {each.candidate.split()[1] for each in left_out} == {"single"}
    assert {each.wrong for each in left_out} == {wrong}
    assert all(type(error).__name__ in each.reason and len(each.reason) < 500 for each in left_out)
    assert all(each.reason.endswith(str(error)[-10:]) for each in left_out)
    assert not any(name.startswith("single") for name in found.microseconds["forward"])


@pytest.mark.usefixtures("card")
def test_eager_that_fails_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "run_eager", raising(torch.OutOfMemoryError("CUDA out of memory")))
    found, _ = tuned_call(CALL, counting_timer(1, 1))
    assert list(found.microseconds["step"]) == ["fused"]
    # JSON has no infinity
    json.dumps(asdict(found), allow_nan=False)
    assert _tuned._cells(found, "graph", found.in_graph)[-2:] == ["", ""]


@pytest.mark.usefixtures("card")
def test_a_call_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_triton, "down", raising(torch.OutOfMemoryError("CUDA out of memory")))
    found, (left_out,) = search.tune_call(CALL, device(), counting_timer(1, 1), lambda what: None)
    assert found is None
    assert (left_out.candidate, left_out.wrong) == ("everything", False)


@pytest.mark.usefixtures("card")
def test_a_gpu_that_answers_no_more_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_triton, "lora_forward_single", raising(RuntimeError("an illegal memory access")))
    monkeypatch.setattr(search, "answers", lambda device: False)
    with pytest.raises(
        search.GpuLostError, match=r"after forward single.*illegal memory access.*start again"
    ):
        tuned_call(CALL, counting_timer(1, 1))


class Largest(TorchDispatchMode):
    """Notes how many elements the largest float64 tensor has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, Tensor) and each.dtype == torch.float64:
                self.elements = max(self.elements, each.numel())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_truth_of_many_rows_takes_the_memory_of_few(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the eager formula's in float64, and no float64 copy of all rows is made on the way."""
    call = replace(CALL, rows=2000, dropout=dropout, dtype="bfloat16")
    tensors = draw(call, torch.device("cpu"))
    keep = torch.rand(2000, call.inputs) >= dropout if dropout else None
    exact = run_eager(tensors.to(torch.float64), keep=keep)
    monkeypatch.setattr(truth, "_BLOCK_BYTES", 8 * call.outputs * 300)
    with Largest() as largest:
        found = truth.truth_of(tensors, keep)
    assert largest.elements <= 512 * call.outputs
    assert (int(found.rows[0]), int(found.rows[-1]), len(found.rows)) == (0, 1999, 512)
    for index, (got, wanted) in enumerate(zip(found.exact, exact, strict=True)):
        torch.testing.assert_close(got, wanted[found.rows] if index < 2 else wanted)
    # eager itself passes, what is off by a tenth of the largest does not
    eager = run_eager(tensors, keep=keep)
    found.check(eager, first=0)
    for index, value in enumerate(eager):
        with pytest.raises(truth.WrongResult, match="errs by"):
            found.check([value + value.abs().max() / 10], first=index)


@pytest.mark.usefixtures("card")
def test_a_wrong_result_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, *rest: Any, **more: Any) -> None:
        lora_forward(x * 1.05, *rest, **more)

    monkeypatch.setattr(lora_triton, "lora_forward", wrong)
    found, left_out = tuned_call(CALL, counting_timer(1000, -1))
    assert left_out != []
    assert all(each.wrong and "WrongResult: errs by" in each.reason for each in left_out)
    assert {each.candidate.split()[1] for each in left_out} == {"split"}
    assert found.forward.path not in ("split", tuned.REFERENCE)
