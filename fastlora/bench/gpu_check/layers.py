"""LoRA layers on the card: in eager mode, as CUDA graphs, what they cost the host, and what was predicted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._inductor import config as inductor

from fastlora.bench.candidates import DTYPES, TOLERANCE, lora_candidates
from fastlora.bench.cases import GPU, HEADLINES, Case, layer_work
from fastlora.bench.checked import checked_candidates
from fastlora.bench.clocks import make_calls_clock, make_gpu_clock
from fastlora.bench.gpu_check.items import Found, Item, refuse_lost_gpu
from fastlora.bench.gpu_check.profiled import profile_item
from fastlora.bench.results import EAGER_MODE, GRAPHS, OURS
from fastlora.bench.results_file import as_json_row
from fastlora.bench.turns import Step, take_turns
from fastlora.tuning.timing import captured, host_us
from fastlora_kernels import targets
from fastlora_kernels.choose.explain import explain
from fastlora_kernels.choose.quantised import Stored
from fastlora_kernels.tile import Shape

# rows, columns in, columns out
SHAPES: dict[str, tuple[int, int, int]] = {name: GPU[name] for name in HEADLINES}
ROUNDS = 7
# whose code is neither torch's own operations nor ours
OTHERS = ("peft", "peft_same_dtype", "compiled")


def items(device: torch.device) -> Sequence[Item]:
    """An item for each shape and dropout, in bf16."""
    return [Item(_name(case), partial(rows, case, device)) for case in _cases()]


def profiles() -> Sequence[Item]:
    """An item for each of :func:`items`, to come after all that is timed."""
    return [profile_item(_name(case), partial(_ours, case)) for case in _cases()]


def comparisons(device: torch.device) -> Sequence[Item]:
    """What several processes do before anything is timed: candidates compared, all of them compiled."""
    return [Item(f"candidates: {_name(case)}", partial(compared, case)) for case in _cases()]


def compared(case: Case) -> Iterator[Found]:
    """Every candidate beside the eager formula; what was compiled is kept for :func:`rows`."""
    # processes enough are at work
    inductor.compile_threads = 1
    made, _ = checked_candidates(case, lora_candidates, TOLERANCE[case.dtype])
    for step in made.steps.values():
        step()
    what = "every candidate computes the eager formula"
    yield {"outcome": {"case": f"candidates: {_name(case)}", "what": what, "right": True}}


def rows(case: Case, device: torch.device) -> Iterator[Found]:
    """Both passes of every candidate in a row of eager mode and one of graphs."""
    made, left_out = checked_candidates(case, lora_candidates, TOLERANCE[case.dtype])
    told: dict[str, Any] = layer_work(case) | {"predicted_ms": predicted_ms(case, device)}
    yield from timed_rows(case, made.steps, told, left_out, device)


def timed_rows(
    case: Case,
    steps: Mapping[str, Step],
    told: Mapping[str, Any],
    left_out: Mapping[str, str],
    device: torch.device,
) -> Iterator[Found]:
    """The rows of a case's candidates.

    Args:
        case: In eager mode.
        steps: Both passes of each candidate, fastlora's among them.
        told: What else is known of the case.
        left_out: Why other candidates are not among them, by name.
        device: The GPU.
    """
    timed = take_turns(steps, ROUNDS, make_calls_clock(steps[OURS]))
    host = {name: host_us(step, device) / 1e3 for name, step in steps.items()}
    yield {"row": as_json_row(case, timed, host_ms=host, left_out=dict(left_out), **told)}
    graphs, failed = _graphs(steps, device)
    timed = take_turns(graphs, ROUNDS, make_gpu_clock())
    yield {"row": as_json_row(replace(case, suite=GRAPHS), timed, left_out={**left_out, **failed}, **told)}


def predicted_ms(case: Case, device: torch.device, *, weight: Stored | None = None) -> dict[str, float]:
    """What the launch plan predicts for the frozen layer and for fastlora, forward and backward.

    Args:
        case: The layer.
        device: The GPU.
        weight: How fastlora's frozen weight is stored; None for dense.
    """
    assert case.m is not None
    assert case.k is not None
    assert case.n is not None
    shape = Shape(case.m, case.n, case.k, case.rank, aligned=case.k % 16 == 0 and case.n % 16 == 0)
    target = targets.detect(device)
    told = explain("lora_linear", shape, DTYPES[case.dtype], target, dropout=case.dropout, weight=weight)
    return {"frozen": told.ceiling_us / 1e3, OURS: told.predicted_us / 1e3}


def _ours(case: Case) -> Step:
    return lora_candidates(case).steps[OURS]


def _cases() -> list[Case]:
    return [
        Case(EAGER_MODE, name, m, k, n, dropout=dropout)
        for name, (m, k, n) in SHAPES.items()
        for dropout in (0.0, 0.1)
    ]


def _name(case: Case) -> str:
    return f"{case.name}, p = {case.dropout:g}"


def _graphs(steps: Mapping[str, Step], device: torch.device) -> tuple[dict[str, Step], dict[str, str]]:
    """Each step as the replay of a graph, and why some of other packages can't be captured."""
    made, failed = dict[str, Step](), dict[str, str]()
    for name, step in steps.items():
        try:
            made[name] = _replaying(captured(step, device))
        except Exception as error:
            # what other packages do while a graph is captured is not ours to foresee
            if name not in OTHERS:
                raise
            refuse_lost_gpu(name)
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return made, failed


def _replaying(graph: torch.cuda.CUDAGraph) -> Step:
    def replay() -> tuple[()]:
        graph.replay()
        return ()

    return replay
