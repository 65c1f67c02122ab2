"""Forward + backward of a bottleneck adapter on the CPU, against the eager module.

Every candidate is checked before it is timed, then all candidates of a case take turns in one process. Beside
them stand the six matrix products that every implementation has to compute, alone and into memory that is
already there: no implementation on the same library can be faster. Bytes kept for backward are counted beside
h, which autograd keeps anyway.

    python benchmarks/cpu_adapters.py --threads 2 --output benchmarks/results/cpu-adapters.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from turns import Step, check_equal, environment, geometric_mean, take_turns

import fastlora

ROWS, HIDDEN, BOTTLENECKS = (512, 4096), (384, 768, 1024, 4096), (16, 64, 256)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2}
CANDIDATES = ("fastlora", "products")


class EagerAdapter(nn.Module):
    """The module as everybody writes it."""

    def __init__(self, hidden_size: int, adapter_size: int, dropout: float) -> None:
        """Random weights, the up-projection too, so that every gradient is real."""
        super().__init__()
        self.down = nn.Linear(hidden_size, adapter_size)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(adapter_size, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same."""
        update: Tensor = self.up(self.dropout(self.activation(self.down(h))))
        return h + update


def main() -> None:
    """Time every case, print it as it comes, and write all of them as JSON and as a table."""
    options = _options()
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in DTYPES:
            for hidden in HIDDEN:
                for bottleneck in BOTTLENECKS:
                    for count in ROWS:
                        case = {"threads": threads, "dropout": options.dropout, "dtype": dtype}
                        sizes = {"rows": count, "hidden": hidden, "bottleneck": bottleneck}
                        rows.append(_time_case(case | sizes, options.rounds))
                        print(_line(rows[-1]), flush=True)
    print(*_summary(rows), sep="\n")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": environment(), "rows": rows}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(_markdown(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each candidate")
    parser.add_argument("--output", type=Path, help="JSON file to write, with the table beside it")
    return parser.parse_args()


def _time_case(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    # without dropout all compute the same function; with it, each draws a mask of its own
    steps = _candidates(case | {"dropout": 0.0})
    check_equal("fastlora", steps["fastlora"](), steps["eager"](), TOLERANCE[case["dtype"]])
    steps = _candidates(case)
    kept = {name: _kept_bytes(steps[name]) for name in ("eager", "fastlora")}
    return case | take_turns(steps, rounds) | {"kept_bytes": kept}


def _candidates(case: dict[str, Any]) -> dict[str, Step]:
    torch.manual_seed(0)
    rows, hidden, dtype = case["rows"], case["hidden"], DTYPES[case["dtype"]]
    eager = EagerAdapter(hidden, case["bottleneck"], case["dropout"]).to(dtype)
    ours = fastlora.AdapterLayer(hidden, case["bottleneck"], dropout=case["dropout"], dtype=dtype)
    for mine, theirs in ((ours.down_proj, eager.down), (ours.up_proj, eager.up)):
        mine.load_state_dict(theirs.state_dict())
    h = torch.randn(rows, hidden).to(dtype).requires_grad_()
    dout = torch.randn(rows, hidden).to(dtype)

    def step_of(module: nn.Module) -> Step:
        inputs = (h, *module.parameters())

        def step() -> tuple[Tensor, ...]:
            out = module(h)
            return (out.detach(), *torch.autograd.grad(out, inputs, dout))

        return step

    products = _products(h.detach(), dout, eager.down.weight.detach(), eager.up.weight.detach())
    return {"eager": step_of(eager), "fastlora": step_of(ours), "products": products}


def _products(h: Tensor, dout: Tensor, down: Tensor, up: Tensor) -> Step:
    """The six products of the formula and its gradients, without anything else."""
    z, out = h @ down.t(), torch.empty_like(h)
    d_down, d_up = torch.empty_like(down), torch.empty_like(up)

    def step() -> tuple[Tensor, ...]:
        torch.mm(h, down.t(), out=z)
        torch.mm(z, up.t(), out=out)
        torch.mm(dout, up, out=z)
        torch.mm(dout.t(), z, out=d_up)
        torch.mm(z.t(), h, out=d_down)
        torch.mm(z, down, out=out)
        return ()

    return step


def _kept_bytes(step: Step) -> int:
    """Bytes of the storages kept for backward, without those given to the step."""
    given, kept = _shared_storages(step), dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def _shared_storages(step: Step) -> set[int]:
    cells = {name: cell.cell_contents for name, cell in _closure(step).items()}
    tensors = [*cells["inputs"], cells["h"], cells["dout"]]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _closure(step: Callable[..., Any]) -> dict[str, Any]:
    return dict(zip(step.__code__.co_freevars, step.__closure__ or (), strict=True))


def _speed_ups(row: dict[str, Any]) -> dict[str, float]:
    medians = row["median_ms"]
    return {name: medians["eager"] / medians[name] for name in CANDIDATES}


def _line(row: dict[str, Any]) -> str:
    ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in _speed_ups(row).items())
    size = f"{row['rows']}x{row['hidden']}, {row['bottleneck']}"
    return (
        f"threads {row['threads']}  p {row['dropout']}  {row['dtype']}  {size:<15} "
        f"eager {row['median_ms']['eager']:7.2f} ms  {ratios}"
    )


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        for dtype in (*DTYPES, "all"):
            chosen = [r for r in rows if r["threads"] == threads and dtype in (r["dtype"], "all")]
            means = {name: geometric_mean(_speed_ups(row)[name] for row in chosen) for name in CANDIDATES}
            lost = sum(_speed_ups(row)["fastlora"] < 1 for row in chosen)
            lines.append(
                f"geometric mean over eager, threads {threads}, {dtype}: fastlora {means['fastlora']:.2f}x "
                f"(slower in {lost} of {len(chosen)}), the six products alone {means['products']:.2f}x"
            )
    return lines


def _markdown(result: dict[str, Any]) -> str:
    machine, rows = result["environment"], result["rows"]
    lines = [
        "# Bottleneck adapter on the CPU",
        "",
        f"Forward + backward (GELU, dropout {rows[0]['dropout']}): times faster than the eager module.",
        f"{machine['cores']} cores, {machine['processor']} ({machine['capability']}), "
        f"torch {machine['torch']}, {machine['date']}.",
        "Medians, all candidates taking turns in one process. `products` are the six matrix products of the",
        "formula alone, without activation, bias, residual or memory of their own: a bound for this library.",
        "Kept: bytes kept for backward beside h. Bold: slower than eager.",
        "",
        "| threads | dtype | rows × hidden | bottleneck | eager, ms | fastlora | products | kept, eager "
        "| kept |",
        "|" + "---|" * 9,
        *map(_markdown_row, rows),
        "",
        *(f"- {line}" for line in _summary(rows)),
    ]
    return "\n".join(lines) + "\n"


def _markdown_row(row: dict[str, Any]) -> str:
    ratios, kept = _speed_ups(row), row["kept_bytes"]
    ours = f"{ratios['fastlora']:.2f}"
    cells = [row["threads"], row["dtype"], f"{row['rows']} × {row['hidden']}", row["bottleneck"]]
    cells += [f"{row['median_ms']['eager']:.2f}", f"**{ours}**" if ratios["fastlora"] < 1 else ours]
    cells += [f"{ratios['products']:.2f}", f"{kept['eager']:,}", f"{kept['fastlora']:,}"]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
