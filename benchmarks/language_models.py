"""A LoRA training step of SmolLM2-135M on the CPU: PEFT, and the same PEFT model accelerated by fastlora.

r = 16 on all linear layers but the head, AdamW, one text (of 512 tokens by default), the model's own loss
and, with ``--loss chunked``, also one that is taken some rows at a time. The frozen weights are dense, or NF4
by bitsandbytes with nested statistics. All candidates take turns in one process.
"Frozen" is the model without LoRA whose backward passes on dX alone: nothing that trains through it can be
faster. Beside the times: what forward keeps for backward, the most that a step's tensors hold, and how far
the losses of 50 steps are, without dropout, from those of PEFT in float32 over the same weights.

    python -m benchmarks.language_models --weights nf4 --output docs/results/language_models
"""

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from benchmarks.peft_steps import ALPHA, DTYPES, RANK, kept, training_step
from benchmarks.runs import page_parser, table
from fastlora._core.extras import require
from fastlora._core.files import write_file, write_report
from fastlora.bench.turns import environment, peak_bytes, take_turns
from fastlora.transfer.models.smollm2 import load_causal, save_dense

# of the text whose step is timed, by default
TOKENS = 512
# of the comparison of losses
LOSSES, SHORT = 50, 128
WEIGHTS = ("dense", "nf4")


def load(folder: Path, weights: str, dtype: torch.dtype) -> Any:
    """The model with these frozen weights, computing in this dtype."""
    model = load_causal(folder, quantised=None if weights == "dense" else weights, dtype=dtype)
    model.config.use_cache = False
    return model


def candidates(
    base: Any, dropout: float, loss: str = "model", *, one_mask: bool = False
) -> dict[str, nn.Module]:
    """The frozen model, PEFT's and the accelerated one; with ``chunked`` for loss another that chunks it, and
    on request one whose layers that share their input drop the same of it.
    """
    peft = require("peft", distribution="peft", purpose="the comparison with PEFT", extra="bench")
    frozen = copy.deepcopy(base).requires_grad_(False).train()
    frozen.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_())
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    own = peft.get_peft_model(copy.deepcopy(base), config).train()
    found = {"frozen": frozen, "peft": own, "fastlora": fastlora.accelerate(copy.deepcopy(own))}
    if loss == "chunked":
        found["chunked"] = fastlora.accelerate(copy.deepcopy(own), loss="chunked")
    if one_mask:
        found["one mask"] = fastlora.accelerate(copy.deepcopy(own), one_mask=True)
    return found


def batch(seed: int, tokens: int = TOKENS) -> dict[str, Tensor]:
    """One text of random words; which they are makes no difference to the time."""
    words = torch.randint(1000, 30000, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": words, "labels": words}


def losses(model: nn.Module) -> list[float]:
    """The loss of each of the first steps, every one of another text."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    found = []
    for seed in range(LOSSES):
        loss = model(**batch(seed, SHORT)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


def _furthest(values: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(value - other) for value, other in zip(values, others, strict=True))


def measure(
    base: Any, dropout: float, rounds: int, loss: str, tokens: int, *, one_mask: bool
) -> dict[str, Any]:
    """Times, bytes kept and peaks of the candidates."""
    models, words = candidates(base, dropout, loss, one_mask=one_mask), batch(0, tokens)
    steps = {name: training_step(model, words) for name, model in models.items()}
    row: dict[str, Any] = dict(take_turns(steps, rounds))
    trained = [name for name in models if name != "frozen"]
    row["kept_bytes"] = {name: kept(models[name], words) for name in trained}
    row["peak_bytes"] = {name: peak_bytes(steps[name]) for name in trained}
    return row


def compare_losses(folder: Path, weights: str, loss: str) -> dict[str, float]:
    """How far the losses of each candidate are at most from those of PEFT in float32."""
    found: dict[str, list[float]] = {}
    for name, dtype in DTYPES.items():
        models = candidates(load(folder, weights, dtype), 0.0, loss)
        del models["frozen"]
        found |= {f"{name}: {each}": losses(model) for each, model in models.items()}
    exact = found.pop("fp32: peft")
    return {each: _furthest(values, exact) for each, values in found.items()}


def main() -> None:
    """Measure and write the page."""
    parser = page_parser(__doc__, "docs/results/language_models")
    parser.add_argument("--weights", choices=WEIGHTS, nargs="+", default=list(WEIGHTS))
    parser.add_argument("--loss", choices=("model", "chunked"), default="model", help="Add a chunked loss.")
    parser.add_argument("--one-mask", action="store_true", help="Add layers that drop the same of their x.")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="Of the text whose step is timed.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-losses", action="store_true", help="Leave the comparison of 50 steps out.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, apart = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_dense(folder)
        for weights in arguments.weights:
            for dtype_name, dtype in DTYPES.items():
                for dropout in arguments.dropout:
                    row = {"weights": weights, "dtype": dtype_name, "dropout": dropout}
                    row |= measure(
                        load(folder, weights, dtype),
                        dropout,
                        arguments.rounds,
                        arguments.loss,
                        arguments.tokens,
                        one_mask=arguments.one_mask,
                    )
                    rows.append(row)
                    print(json.dumps(row), flush=True)
            if not arguments.no_losses:
                apart[weights] = compare_losses(folder, weights, arguments.loss)
                print(json.dumps(apart[weights]), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = environment("peft", "transformers", "bitsandbytes")
    machine |= {"threads": arguments.threads, "rounds": arguments.rounds, "tokens": arguments.tokens}
    report = {"environment": machine, "rows": rows, "losses_apart": apart}
    write_report(arguments.output / "steps.json", report)
    write_file(arguments.output / "README.md", page(rows, apart, machine).encode())


INTRODUCTION = """# A language model, accelerated

One training step (forward, the model's own loss, backward, AdamW) of SmolLM2-135M on 1 × {tokens} tokens,
LoRA r = {rank} on all linear layers but the head, PEFT's own defaults. `fastlora` is the same PEFT model
after `fastlora.accelerate(model)`{chunked}. Times as multiples of
the frozen model's, whose backward passes on dX alone; medians of {rounds} turns that alternate between the
candidates. Kept is what forward leaves for backward, peak the most that a step's tensors hold, in MiB, in the
candidates' order. `python -m benchmarks.language_models`, with the options that the
index of results names, regenerates the page.
"""


def page(rows: list[dict[str, Any]], apart: dict[str, dict[str, float]], machine: dict[str, Any]) -> str:
    """The table, the losses, and where it was measured."""
    names = list(rows[0]["kept_bytes"])
    shown = [name.replace("peft", "PEFT") for name in names]
    heads = ["weights", "dtype", "dropout", "frozen, s", *shown, "PEFT / fastlora", "kept", "peak"]
    lines = []
    for row in rows:
        times = row["median_ms"]
        cells = [row["weights"], row["dtype"], f"{row['dropout']:g}", f"{times['frozen'] / 1000:.2f}"]
        cells += [f"{times[name] / times['frozen']:.2f}" for name in names]
        cells.append(f"**{times['peft'] / times['fastlora']:.2f}×**")
        for memory in (row["kept_bytes"], row["peak_bytes"]):
            cells.append(", ".join(f"{memory[name] / 2**20:.0f}" for name in names))
        lines.append(cells)
    told = ', `chunked` after `accelerate(model, loss="chunked")`' if "chunked" in names else ""
    told += ", `one mask` after `accelerate(model, one_mask=True)`" if "one mask" in names else ""
    options = {name: machine[name] for name in ("tokens", "rounds")}
    text = [INTRODUCTION.format(**options, rank=RANK, chunked=told), *table(heads, lines)]
    for weights, distances in apart.items():
        told = ", ".join(f"{name} {distance:.1e}" for name, distance in distances.items())
        steps = f"{LOSSES} steps of {SHORT} tokens"
        text.append(f"\nLosses of {steps} ({weights}), at most from PEFT's in float32: {told}.")
    text.append(f"\n{', '.join(f'{name} {value}' for name, value in machine.items())}.")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
