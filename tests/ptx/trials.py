"""Every launch that there is to try, by its kernel's name, and the sums behind split reductions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora_kernels.compile.specs import DTYPES, Spec
from fastlora_kernels.compiled import tile_text
from fastlora_kernels.partials import sum_four_partials, sum_partials, sum_two_partials
from tests.kernel_harness import Harness
from tests.ptx.adapter_trials import ADAPTER_TRIALS
from tests.ptx.execute import Outcome
from tests.ptx.executed_gpu import ExecutedGpu
from tests.ptx.lora_trials import LORA_TRIALS
from tests.ptx.quant_trials import QUANT_TRIALS
from tests.ptx.trial import Trial

# a persistent kernel's is its record's name and " persistent"
TRIALS: dict[str, Callable[[Trial], None]] = {**LORA_TRIALS, **ADAPTER_TRIALS, **QUANT_TRIALS}


def trial_name(spec: Spec) -> str:
    """Which of :data:`TRIALS` launches a spec."""
    return f"{spec.kernel} persistent" if spec.tile.persistent else spec.kernel


def said_of(spec: Spec) -> str:
    """A spec in words."""
    flags = {
        "dropout": spec.dropout,
        "unaligned": not spec.aligned,
        "rank 8": spec.aligned and not spec.rank_aligned,
        "chunks": not spec.one_chunk,
        f"adapter in {spec.adapter_dtype}": spec.adapter_dtype != "fp32",
    }
    parts = [spec.target, spec.dtype, trial_name(spec), tile_text(spec.tile), spec.activation]
    without = [f"without {flag}" for flag in spec.absent]
    return ", ".join([*filter(None, parts), *(name for name, there in flags.items() if there), *without])


def try_spec(gpu: ExecutedGpu, spec: Spec, *, ragged: bool = True) -> Outcome:
    """Launch a spec and compare what it gives with float64.

    Args:
        gpu: What executes it.
        spec: What is launched.
        ragged: Whether every axis ends within a tile.

    Returns:
        What the launch did.

    Raises:
        AssertionError: It gave something else, or did what no right code does.
    """
    gpu.target = spec.target
    gpu.outcomes.clear()
    trial = Trial(spec, ragged=ragged)
    TRIALS[trial_name(spec)](trial)
    trial.harness.assert_margins_untouched()
    (outcome,) = gpu.outcomes
    return outcome


def try_sums(dtype: str) -> None:
    """The second step of every split reduction: exactly the sum in the order of the parts.

    Args:
        dtype: Of the results.

    Raises:
        AssertionError: It is another one.
    """
    torch.manual_seed(0)
    harness = Harness(DTYPES[dtype], torch.device("cpu"))

    def parts(count: int, size: int) -> Tensor:
        return harness.random(count, size, dtype=torch.float32)

    # around a block's length, and none
    for count, size in ((1, 1), (5, 1023), (3, 1024), (2, 2049), (0, 7)):
        partial, out = parts(count, size), harness.output(size)
        sum_partials(partial, out)
        assert torch.equal(out, _in_order(partial).to(out.dtype)), (count, size)
    pairs = [(parts(count, size), harness.output(size)) for count, size in ((3, 1025), (2, 17))]
    sum_two_partials(*pairs[0], *pairs[1])
    assert all(torch.equal(out, _in_order(partial).to(out.dtype)) for partial, out in pairs)
    outs: Any = tuple(harness.output(size) for size in (1200, 1200, 40, 1))
    partial = parts(4, 2441)
    sum_four_partials(partial, *outs)
    assert torch.equal(torch.cat(outs), _in_order(partial).to(outs[0].dtype))
    harness.assert_margins_untouched()


def _in_order(partial: Tensor) -> Tensor:
    total = torch.zeros(partial.shape[1])
    for part in partial:
        total = total + part
    return total
