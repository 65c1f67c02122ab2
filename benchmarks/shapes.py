"""Every shape that is timed, by name: the one place to add a case."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastlora.bench.work import lora_flops, lora_least_bytes

RANK, ALPHA = 16, 32.0
FORWARD, BOTH, STEP = "forward", "forward_backward", "step"


@dataclass(frozen=True)
class Case:
    """One row of the results.

    Attributes:
        suite: ``layers``, ``memory``, ``adapters`` or ``steps``.
        name: The model's layer, for people.
        m: Rows of the input, None where the case is a whole model.
        k: Its columns.
        n: Columns of the output.
        rank: Of LoRA; the bottleneck of an adapter.
        dtype: Of the frozen weights: ``fp32``, ``bf16`` or ``fp16``.
        dropout: Probability.
        passes: ``forward``, ``forward_backward`` or ``step``.
        threads: Of the CPU; None on a GPU.
        busy: Processes that keep the CPU busy beside it.
    """

    suite: str
    name: str
    m: int | None
    k: int | None
    n: int | None
    rank: int = RANK
    dtype: str = "bf16"
    dropout: float = 0.0
    passes: str = BOTH
    threads: int | None = None
    busy: int = 0

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cuda" if self.threads is None else "cpu"

    @property
    def id(self) -> str:
        """For pytest."""
        sizes = [] if self.m is None else [f"{self.m}x{self.k}x{self.n}r{self.rank}"]
        where = (
            "gpu" if self.threads is None else f"t{self.threads}" + (f"-busy{self.busy}" if self.busy else "")
        )
        return "-".join(
            [*sizes, self.name.replace(" ", "_"), self.dtype, f"p{self.dropout:g}", self.passes, where]
        )

    def without_dropout(self) -> "Case":
        """The case in which all candidates compute the same."""
        return replace(self, dropout=0.0)

    def as_row(self) -> dict[str, Any]:
        """For the results file."""
        row = asdict(self)
        row["pass"] = row.pop("passes")
        if self.busy:
            row["name"] += f" beside {self.busy} busy processes"
        return row

    @property
    def is_quick(self) -> bool:
        """Whether ``--quick`` keeps it: what tells most in least time."""
        return self.threads == 2 and self.name in QUICK


VIT, BERT, LLAMA_8B, LLAMA_70B = "ViT-B", "BERT-base", "LLaMA-8B", "LLaMA-70B"
# columns in, columns out
LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    VIT: {"attention": (768, 768), "MLP up": (768, 3072), "MLP down": (3072, 768)},
    BERT: {"attention": (768, 768), "FFN up": (768, 3072), "FFN down": (3072, 768)},
    LLAMA_8B: {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)},
    LLAMA_70B: {"q, o": (8192, 8192), "k, v": (8192, 1024), "gate, up": (8192, 28672), "down": (28672, 8192)},
}
# 32 pictures of 197 tokens, 16 texts of 512, 2 of 4096
ROWS = {VIT: 32 * 197, BERT: 16 * 512, LLAMA_8B: 2 * 4096, LLAMA_70B: 2 * 4096}
# whose DRAM traffic and times are published for other kernels
SQUARES = {f"square {side}": (8192, side, side) for side in (4096, 5120, 8192)}
SMALL = {f"LLaMA-8B q, o, {rows} rows": (rows, 4096, 4096) for rows in (1, 16, 64, 256)}
VIT_ATTENTION = f"{VIT} attention"
# rows, columns in, columns out: what two cores can do in minutes
CPU = {
    VIT_ATTENTION: (4096, 768, 768),
    "ViT-B MLP up": (2048, 768, 3072),
    "BERT-large FFN up": (1024, 1024, 4096),
    "BERT-base FFN down": (512, 3072, 768),
}
CPU_SMALL = {"LLaMA-8B k, v, 32 rows": (32, 4096, 1024)}
QUICK = (VIT_ATTENTION, *CPU_SMALL, "hidden 384", "ViT-Ti", "DINOv2-S")
GPU = {
    **{f"{model} {name}": (ROWS[model], *sizes) for model in LAYERS for name, sizes in LAYERS[model].items()},
    **SQUARES,
    **SMALL,
}
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


def layer_work(case: Case) -> dict[str, int]:
    """Operations and least memory traffic of a LoRA layer, as a row has them."""
    if case.m is None or case.k is None or case.n is None:
        return {}
    sizes, backward = (case.m, case.k, case.n, case.rank), case.passes == BOTH
    itemsize, dropout = 4 if case.dtype == "fp32" else 2, case.dropout > 0
    return {
        "flops": lora_flops(*sizes, backward=backward),
        "least_bytes": lora_least_bytes(*sizes, itemsize=itemsize, dropout=dropout, backward=backward),
    }


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
