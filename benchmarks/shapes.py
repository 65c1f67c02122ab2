"""Every case that is timed; layers on GPUs are named in ``fastlora/bench/cases.py``."""

import json
from collections.abc import Iterator
from pathlib import Path

from fastlora.bench.cases import (
    BERT,
    BOTH,
    FORWARD,
    GPU,
    HEADLINES,
    LLAMA_8B,
    LLAMA_70B,
    RANK,
    SQUARES,
    STEP,
    VIT_ATTENTION,
    Case,
)

# rows, columns in, columns out: what two cores can do in minutes
CPU = {
    VIT_ATTENTION: (4096, 768, 768),
    "ViT-B MLP up": (2048, 768, 3072),
    "BERT-large FFN up": (1024, 1024, 4096),
    "BERT-base FFN down": (512, 3072, 768),
}
CPU_SMALL = {"LLaMA-8B k, v, 32 rows": (32, 4096, 1024)}
QUICK = (VIT_ATTENTION, *CPU_SMALL, "hidden 384", "ViT-Ti", "DINOv2-S")
# bytes follow from sizes, so a few layers show them
GPU_MEMORY = [
    VIT_ATTENTION,
    f"{BERT} FFN up",
    f"{LLAMA_8B} q, o",
    f"{LLAMA_8B} gate, up",
    f"{LLAMA_70B} down",
    *SQUARES,
]
# rows, hidden size, bottleneck
ADAPTERS = [(m, h, d) for h in (384, 768, 1024, 4096) for d in (16, 64, 256) for m in (512, 4096)]


def layer_cases(suite: str = "layers") -> Iterator[Case]:
    """LoRA layers: forward + backward on one thread and on two, forward alone on two; all of it on a GPU."""
    for dropout in (0.0, 0.1):
        for dtype in ("fp32", "bf16"):
            for passes, threads in ((BOTH, 1), (BOTH, 2), (FORWARD, 2)):
                shapes = CPU | CPU_SMALL if threads == 2 else CPU
                yield from _of(shapes, suite, dtype, dropout, passes, threads)
        for dtype in ("bf16", "fp16"):
            for passes in (FORWARD, BOTH):
                yield from _of(GPU, suite, dtype, dropout, passes, None)


def memory_cases() -> Iterator[Case]:
    """Bytes of LoRA layers, which depend on the shape and not on the machine's speed."""
    for dropout in (0.0, 0.1):
        yield from _of(CPU, "memory", "bf16", dropout, BOTH, 2)
        # in fp32 everything has the same dtype: one shape shows it
        yield from _of({VIT_ATTENTION: CPU[VIT_ATTENTION]}, "memory", "fp32", dropout, BOTH, 2)
        yield from _of({name: GPU[name] for name in GPU_MEMORY}, "memory", "bf16", dropout, BOTH, None)


def adapter_cases() -> Iterator[Case]:
    """Bottleneck adapters; the rank is the bottleneck."""
    for dtype, threads in (("fp32", 2), ("bf16", 2), ("bf16", None), ("fp16", None)):
        for m, hidden, bottleneck in ADAPTERS:
            name = f"hidden {hidden}"
            yield Case("adapters", name, m, hidden, hidden, rank=bottleneck, dtype=dtype, threads=threads)


def step_cases() -> Iterator[Case]:
    """Whole training steps; the names are those of ``bench_steps.MODELS``."""
    small, whole = ("ViT-Ti", "BERT-tiny"), ("MiniLM", "DINOv2-S")
    for dropout in (0.0, 0.1):
        for dtype, threads, models in (
            ("fp32", 2, small),
            ("bf16", 2, small),
            ("bf16", 1, whole),
            ("bf16", 2, whole),
            ("fp32", None, whole),
            ("bf16", None, whole),
        ):
            for name in models:
                yield _step(name, dtype, dropout, threads)
        # a shared machine: what waits for a second thread shows here
        yield _step("DINOv2-S", "bf16", dropout, 2, busy=2)


def _step(name: str, dtype: str, dropout: float, threads: int | None, *, busy: int = 0) -> Case:
    sizes = (None, None, None)
    return Case("steps", name, *sizes, RANK, dtype, dropout, passes=STEP, threads=threads, busy=busy)


def _of(
    shapes: dict[str, tuple[int, int, int]],
    suite: str,
    dtype: str,
    dropout: float,
    passes: str,
    threads: int | None,
) -> Iterator[Case]:
    for name, (m, k, n) in shapes.items():
        yield Case(suite, name, m, k, n, RANK, dtype, dropout, passes, threads)


def is_quick(case: Case) -> bool:
    """Whether ``--quick`` keeps a case: what tells most in least time."""
    if case.threads is None:
        return (
            case.dtype == "bf16"
            and case.passes != FORWARD
            and case.name in (*HEADLINES, "hidden 768", *QUICK)
        )
    return case.threads == 2 and case.name in QUICK


def adapter_flops(case: Case) -> int | None:
    """Two products forward, four backward."""
    return None if case.m is None or case.k is None else 6 * 2 * case.m * case.k * case.rank


def tune_shapes() -> str:
    """The GPU's layers as ``fastlora tune --shapes`` reads them."""
    calls = [
        {"rows": m, "inputs": k, "outputs": n, "rank": RANK, "dropout": dropout, "dtype": dtype}
        for m, k, n in dict.fromkeys(GPU.values())
        for dtype in ("bfloat16", "float16")
        for dropout in (0.0, 0.1)
    ]
    lines = ",\n ".join(json.dumps(call) for call in calls)
    return f"[{lines}]\n"


if __name__ == "__main__":
    # python -m benchmarks.shapes
    Path(__file__).with_name("shapes.json").write_text(tune_shapes())
