"""Forward + backward of one LoRA layer on the CPU, against the frozen layer alone and against PEFT.

Every candidate is checked before it is timed (without dropout, where all compute the same function). Then all
candidates of a case take turns in one process, so that whatever else the machine does falls on all of them
alike. Reported are medians and their ratio to the frozen layer, whose backward is dX alone: nothing that
trains through the layer can be faster.

    python benchmarks/cpu_layers.py --threads 1 2 --output benchmarks/results/cpu.json
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from turns import Step, check_equal, environment, geometric_mean, take_turns

import fastlora

SHAPES = [(4096, 768, 768), (2048, 768, 3072), (1024, 1024, 4096), (512, 3072, 768)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK, ALPHA = 16, 32.0
CANDIDATES = ("fastlora", "reference", "peft", "peft_same_dtype")
# largest error relative to the reference's largest element that still counts as the same function
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2}


def main() -> None:
    """Time every case, print it as it comes, and write all of them as JSON and as a table."""
    options = _options()
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dropout in options.dropout:
            for dtype_name in DTYPES:
                for shape in SHAPES:
                    rows.append(_time_case(shape, dtype_name, dropout, threads, options.rounds))
                    print(_line(rows[-1]), flush=True)
            print(_summary(rows, threads, dropout), flush=True)
    if options.output is not None:
        write_results(options.output, {"environment": environment("peft"), "rank": RANK, "rows": rows})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each candidate")
    parser.add_argument("--output", type=Path, help="JSON file to write, with the table beside it")
    return parser.parse_args()


def _time_case(
    shape: tuple[int, int, int], dtype_name: str, dropout: float, threads: int, rounds: int
) -> dict[str, Any]:
    # without dropout all candidates compute the same; with it, each draws a mask of its own
    _check_equal(_candidates(shape, DTYPES[dtype_name], 0.0), TOLERANCE[dtype_name])
    steps = _candidates(shape, DTYPES[dtype_name], dropout)
    return {
        "shape": shape,
        "dtype": dtype_name,
        "dropout": dropout,
        "threads": threads,
        **take_turns(steps, rounds),
    }


def _candidates(shape: tuple[int, int, int], dtype: torch.dtype, dropout: float) -> dict[str, Step]:
    """One training step of the layer per candidate; each returns y, dX and, with LoRA, dA and dB."""
    rows, in_features, out_features = shape
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features).to(dtype).requires_grad_(False)
    fused = fastlora.LoRALinear.from_linear(base, rank=RANK, alpha=ALPHA, dropout=dropout)
    with torch.no_grad():
        fused.lora_B.normal_(std=0.02)
    x = torch.randn(rows, in_features).to(dtype).requires_grad_()
    dy = torch.randn(rows, out_features).to(dtype)

    def step_of(forward: Callable[[Tensor], Tensor], *trained: Tensor) -> Step:
        def step() -> tuple[Tensor, ...]:
            y = forward(x)
            return (y.detach(), *torch.autograd.grad(y, (x, *trained), dy))

        return step

    def eager(tensor: Tensor) -> Tensor:
        with fastlora.use_backend("reference"):
            return fused(tensor)

    steps = {"frozen": step_of(base), "fastlora": step_of(fused, fused.lora_A, fused.lora_B)}
    steps["reference"] = step_of(eager, fused.lora_A, fused.lora_B)
    for name, fp32_adapters in (("peft", True), ("peft_same_dtype", False)):
        if fp32_adapters or dtype != torch.float32:
            layer, a, b = _peft_layer(base, fused, dropout, fp32_adapters)
            steps[name] = step_of(layer, a, b)
    return steps


def _peft_layer(
    base: nn.Linear, fused: fastlora.LoRALinear, dropout: float, fp32_adapters: bool
) -> tuple[nn.Module, Tensor, Tensor]:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["0"])
    # PEFT's default keeps the adapters of a 16-bit layer in fp32
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=fp32_adapters)
    layer: Any = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(fused.lora_A)
        b.copy_(fused.lora_B)
    return layer, a, b


def _check_equal(steps: dict[str, Step], tolerance: float) -> None:
    expected = steps["reference"]()
    for name, step in steps.items():
        if name != "frozen":
            check_equal(name, step(), expected, tolerance)


def _ratios(row: dict[str, Any]) -> dict[str, float]:
    medians: dict[str, float] = row["median_ms"]
    return {name: value / medians["frozen"] for name, value in medians.items() if name != "frozen"}


def _line(row: dict[str, Any]) -> str:
    ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in _ratios(row).items())
    shape = "x".join(map(str, row["shape"]))
    case = f"threads {row['threads']}  p {row['dropout']:<4} {row['dtype']}  {shape:<15}"
    return f"{case} frozen {row['median_ms']['frozen']:7.1f} ms  {ratios}"


def _summary(rows: list[dict[str, Any]], threads: int, dropout: float) -> str:
    ratios = [_ratios(row) for row in rows if row["threads"] == threads and row["dropout"] == dropout]
    means = {name: geometric_mean(case[name] for case in ratios if name in case) for name in CANDIDATES}
    text = "  ".join(f"{name} {mean:.3f}x" for name, mean in means.items())
    return f"geometric mean, threads {threads}, p {dropout}: {text}\n"


def write_results(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON file and, beside it, the same as a Markdown table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(_markdown(result))


def _markdown(result: dict[str, Any]) -> str:
    environment, rows = result["environment"], result["rows"]
    lines = [
        "# LoRA layer on the CPU",
        "",
        f"Forward + backward, rank {result['rank']}, as a multiple of the frozen layer's own time.",
        f"{environment['cores']} cores, {environment['processor']} ({environment['capability']}), "
        f"torch {environment['torch']}, PEFT {environment['peft']}, {environment['date']}.",
        "Medians, all candidates taking turns in one process. `peft` keeps fp32 adapters beside a bf16",
        "layer, as it does by default and as fastlora does; `peft_same_dtype` has bf16 adapters. Bold:",
        "as fast as fastlora or faster.",
        "",
        "| threads | dropout | dtype | M × K × N | frozen, ms | " + " | ".join(CANDIDATES) + " |",
        "|" + "---|" * (5 + len(CANDIDATES)),
    ]
    lines += [_markdown_row(row) for row in rows]
    cases = dict.fromkeys((row["threads"], row["dropout"]) for row in rows)
    lines += ["", *(f"- {_summary(rows, *case).strip()}" for case in cases)]
    return "\n".join(lines) + "\n"


def _markdown_row(row: dict[str, Any]) -> str:
    ratios = _ratios(row)
    cells = [row["threads"], row["dropout"], row["dtype"], " × ".join(map(str, row["shape"]))]
    cells.append(f"{row['median_ms']['frozen']:.1f}")
    for name in CANDIDATES:
        text = f"{ratios[name]:.2f}" if name in ratios else "–"
        beats = name != "fastlora" and ratios.get(name, math.inf) <= ratios["fastlora"]
        cells.append(f"**{text}**" if beats else text)
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
