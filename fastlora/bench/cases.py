"""A case of the benchmarks, and the layers that are timed on GPUs."""

from dataclasses import asdict, dataclass, replace
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
        k: Columns of the input.
        n: Columns of the output.
        rank: Rank of LoRA, or size of an adapter's bottleneck.
        dtype: Type of the frozen weights: ``fp32``, ``bf16`` or ``fp16``.
        dropout: Probability.
        passes: ``forward``, ``forward_backward`` or ``step``.
        threads: Number of the CPU's threads; None on a GPU.
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
GPU = {
    **{f"{model} {name}": (ROWS[model], *sizes) for model in LAYERS for name, sizes in LAYERS[model].items()},
    **SQUARES,
    **SMALL,
}
# what tells most in least time
HEADLINES = (
    f"{LLAMA_8B} q, o",
    f"{LLAMA_8B} gate, up",
    # so few rows that the host decides
    f"{LLAMA_8B} q, o, 256 rows",
    VIT_ATTENTION,
    f"{VIT} MLP up",
    f"{BERT} FFN up",
)


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
