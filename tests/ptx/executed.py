"""Execute one target's kernels: ``python -m tests.ptx.executed --suite "sm_90 full" --cache FOLDER``.

A process of its own, because Triton's interpreter, which the other tests run in, and its compiler can't share
one. The last line is a JSON object.
"""

import argparse
import functools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastlora_kernels.compile.specs import DTYPES, Spec, variants
from fastlora_kernels.lora.kernels import LORA_FORWARD
from tests.ptx.counters import TARGETS, count, counted_specs
from tests.ptx.executed_gpu import ExecutedGpu
from tests.ptx.faults import faults
from tests.ptx.trial import chosen_specs
from tests.ptx.trials import said_of, trial_name, try_spec, try_sums

# one of each kind of code: a pipeline with a mask, a plain one, shuffles and bank conflicts, TMA with wgmma
_QUICK = (
    ("sm_80", "lora_down"), ("sm_80", "lora_forward"), ("sm_80", "adapter_grad_h_weights"),
    ("sm_90", "lora_forward persistent"),
)  # fmt: skip


def specs_of(suite: str) -> list[Spec]:
    """What a suite executes: one tile of each kernel, dtype and variant, or a few of them.

    Args:
        suite: ``quick``, or a target and ``full``.
    """
    if suite == "quick":
        # of those with and without dropout, or with a bottleneck in one chunk or several, the last
        counted = [spec for target in TARGETS for spec in counted_specs(target, ("bf16",))]
        return list(
            {key: spec for spec in counted if (key := (spec.target, trial_name(spec))) in _QUICK}.values()
        )
    target = suite.split()[0]
    chosen = [spec for dtype in DTYPES for spec in chosen_specs(target, dtype)]
    # adapters in 16 bits, what a call may leave out, and rank 8
    others = [variant for spec in chosen if _has_variants(spec) for variant in variants(spec)]
    others += chosen_specs(target, "bf16", narrow=True)
    # fp16 differs from bf16 in an instruction's type
    return [spec for spec in chosen if spec.aligned or spec.dtype != "fp16"] + others


def _has_variants(spec: Spec) -> bool:
    usual = spec.dtype == "bf16" and spec.aligned and spec.activation in ("", "gelu")
    return usual and spec.dropout == spec.can_drop


def plant(gpu: ExecutedGpu, spec: Spec, *, each: int) -> dict[str, list[bool]]:
    """Whether each fault that was planted in a kernel was noticed, by what was broken.

    Args:
        gpu: What executes.
        spec: What is launched.
        each: How many of each kind at most.
    """
    try_spec(gpu, spec)
    noticed: dict[str, list[bool]] = {}
    for kind, broken in faults(gpu.text, each=each):
        gpu.edit = functools.partial(_instead, broken)
        try:
            try_spec(gpu, spec)
        except AssertionError:
            noticed.setdefault(kind, []).append(True)
        else:
            noticed.setdefault(kind, []).append(False)
    gpu.edit = None
    return noticed


def _is_broken(spec: Spec) -> bool:
    """Whether faults are planted in it: where mma and cp.async are, wgmma, TMA."""
    usual = spec.dtype == "bf16" and spec.rank_aligned and spec.adapter_dtype == "fp32"
    return usual and spec.kernel == LORA_FORWARD.name


def _instead(broken: str, text: str) -> str:
    return broken


def execute_all(suite: str, cache: Path) -> dict[str, Any]:
    """Everything of a suite.

    Args:
        suite: ``quick``, or a target and ``full``.
        cache: Folder that keeps the executor and compiled kernels.

    Returns:
        What was tried, what failed, which faults were noticed, and the counters.
    """
    quick, specs = suite == "quick", specs_of(suite)
    gpu = ExecutedGpu(cache, specs[0].target)
    gpu.install()
    tried, failures = list[str](), dict[str, str]()

    def attempt(name: str, work: Callable[[], object]) -> None:
        tried.append(name)
        try:
            work()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {str(error)[:1500]}"

    for spec in specs:
        attempt(said_of(spec), functools.partial(try_spec, gpu, spec))
    for dtype in ("bf16",) if quick else DTYPES:
        attempt(f"sums, {dtype}", functools.partial(try_sums, dtype))
    counted = specs if quick else counted_specs(specs[0].target)
    broken = {trial_name(spec): spec for spec in specs if _is_broken(spec)}
    if failures:
        # they may well show there, too
        return {"tried": tried, "failures": failures, "faults": {}, "counters": []}
    return {
        "tried": tried,
        "failures": {},
        "faults": {name: plant(gpu, spec, each=1 if quick else 4) for name, spec in broken.items()},
        "counters": [row for spec in counted for row in count(gpu, spec)],
    }


def main() -> None:
    """Print what was learnt."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--suite", choices=("quick", *(f"{target} full" for target in TARGETS)), default="quick"
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps compiled kernels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    json.dump(execute_all(arguments.suite, arguments.cache), sys.stdout)


if __name__ == "__main__":
    main()
