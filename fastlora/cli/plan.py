"""``fastlora plan``: which path a layer call takes on a GPU that need not be here, and why."""

import json
import re
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastlora.cli._console import make_console
from fastlora.cli._weight import Weight

if TYPE_CHECKING:
    from fastlora_kernels.choose.explain import Explanation


class Op(StrEnum):
    """An op with kernels."""

    lora_linear = "lora_linear"
    dora_linear = "dora_linear"
    adapter = "adapter"


class Dtype(StrEnum):
    """The dtype of a layer."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def plan(
    gpu: Annotated[
        str, typer.Option(help="A card such as H100 or RTX 4090, or an architecture such as sm_90.")
    ],
    shape: Annotated[
        str,
        typer.Option(
            help="rows x inputs x outputs of the layer, such as 8192x4096x4096; for an adapter rows x "
            "hidden size."
        ),
    ],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA update; bottleneck of an adapter.")] = 16,
    dropout: Annotated[float, typer.Option(help="Probability of dropout, from 0 to below 1.")] = 0.0,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the layer's input.")] = Dtype.bfloat16,
    op: Annotated[Op, typer.Option(help="What is computed.")] = Op.lora_linear,
    weight: Annotated[
        Weight,
        typer.Option(
            help="How the frozen weight is stored: as the input is, NF4 with nested statistics, int8 with a "
            "factor for every row, or FP8 with one for 128 x 128 values (fp8) or for every row (fp8-rows)."
        ),
    ] = Weight.dense,
    sharing: Annotated[
        str,
        typer.Option(
            help="Outputs of further layers on the same input, as in 1024,1024 for key and value beside a "
            "query: their low-rank products read the input together, and its gradient is computed of all "
            "together, where that is predicted to be faster (two or three layers)."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON on stdout.")] = False,
) -> None:
    """Show which path a layer call takes on a GPU, what it is predicted to cost, and what was rejected.

    Nothing is measured and no GPU is needed: times are predicted from bytes, products, waves of tiles and
    launches. The ceiling is the frozen, dense layer alone, forward and the gradient of its input; for an
    adapter, every large tensor moved once. [bold]fastlora tune[/bold] measures instead, on a GPU.

    With --sharing the plan is of several layers on one input (query, key and value; gate and up), which
    fastlora.accelerate computes together: launches stand in the order of the layers, and beside the plan is
    what the same layers take one by one, with autograd's sums of their gradients. The ceiling is a frozen
    layer with the outputs of all, or the frozen layers one by one where that is faster.

    [bold]Example[/bold]: fastlora plan --gpu H100 --shape 8192x4096x4096 --rank 16 --dropout 0.1

    [bold]Example[/bold]: fastlora plan --gpu H100 --shape 8192x4096x4096 --sharing 1024,1024
    """
    # torch takes a second to import
    import torch

    from fastlora_kernels.choose.explain import explain, explain_shared
    from fastlora_kernels.targets import find_card
    from fastlora_kernels.tile import Shape

    rows, inputs, *outputs = parse_shape(shape, adapter=op is Op.adapter)
    outputs += parse_sharing(sharing)
    _check_sharing(sharing, op, weight)
    target, given = find_card(gpu), getattr(torch, dtype.value)
    sizes = [Shape(rows, n, inputs, rank, aligned=inputs % 16 == 0 and n % 16 == 0) for n in outputs]
    stored: Any = None if weight is Weight.dense else weight.value
    if sharing:
        found = explain_shared(sizes, given, target, dropout=dropout)
    else:
        found = explain(op.value, sizes[0], given, target, dropout=dropout, weight=stored)
    asked: dict[str, Any] = {"op": op.value, "gpu": target.card, "rows": rows, "inputs": inputs}
    asked |= {"outputs": outputs[0], "rank": rank, "dropout": dropout, "dtype": dtype.value}
    asked["weight"] = weight.value
    if sharing:
        asked["sharing"] = outputs[1:]
    if op is Op.lora_linear:
        asked["weight_bytes"] = _weight_bytes(outputs, inputs, given.itemsize, stored)
    if as_json:
        typer.echo(json.dumps(asked | _record(found), indent=1))
    else:
        _show(found, asked, make_console())


def parse_shape(text: str, *, adapter: bool = False) -> tuple[int, int, int]:
    """Rows, inputs and outputs of ``8192x4096x4096``; an adapter's outputs may be left out.

    Raises:
        ValueError: The text is something else, or a size is 0.
    """
    sizes = [int(size) for size in re.split("[x×,]", text)] if re.fullmatch(r"\d+([x×,]\d+)+", text) else []
    if adapter and len(sizes) == 2:
        sizes.append(sizes[1])
    if len(sizes) != 3 or 0 in sizes:
        expected = (
            "rows x hidden size, as in 8192x4096"
            if adapter
            else "rows x inputs x outputs, as in 8192x4096x4096"
        )
        raise ValueError(f"expected --shape {expected}, all at least 1, got {text!r}")
    if adapter and sizes[1] != sizes[2]:
        raise ValueError(f"expected as many outputs as inputs for an adapter, got {text!r}")
    return sizes[0], sizes[1], sizes[2]


def parse_sharing(text: str) -> list[int]:
    """Outputs of further layers, of ``1024,1024``; none of an empty text.

    Raises:
        ValueError: The text is something else, or a size is 0.
    """
    sizes = [int(size) for size in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else []
    if text and (not sizes or 0 in sizes):
        raise ValueError(
            f"expected --sharing outputs of each further layer, as in 1024,1024, at least 1, got {text!r}"
        )
    return sizes


def _check_sharing(sharing: str, op: Op, weight: Weight) -> None:
    if sharing and (op is not Op.lora_linear or weight is not Weight.dense):
        raise ValueError(
            f"expected the op lora_linear and a dense weight beside --sharing, got {op.value} and "
            f"{weight.value}; such layers are computed one by one, as the plan of each shows"
        )


def _weight_bytes(outputs: list[int], inputs: int, itemsize: int, stored: Any) -> int:
    """Bytes of the frozen weights of all layers."""
    from fastlora_kernels.choose.quantised import stored_bytes

    return sum(n * inputs * itemsize if stored is None else stored_bytes(stored, n, inputs) for n in outputs)


def _record(found: "Explanation") -> dict[str, Any]:
    record: dict[str, Any] = {
        "path": found.path,
        "tile": None if found.tile is None else asdict(found.tile),
        "predicted_us": found.predicted_us,
        "ceiling_us": found.ceiling_us,
        "overhead": found.overhead,
        "bytes": found.bytes,
        "flops": found.flops,
        "forward": [asdict(launch) for launch in found.forward.launches],
        "backward": [asdict(launch) for launch in found.backward.launches],
        "rejected": [
            {"pass": part, "path": each.path, "reason": each.refused or "slower"}
            | ({} if each.refused else {"predicted_us": each.microseconds})
            for part, candidates in found.rejected.items()
            for each in candidates
        ],
    }
    if found.apart is not None:
        apart = found.apart
        record["apart"] = {"predicted_us": apart.predicted_us, "bytes": apart.bytes, "flops": apart.flops}
        for part in ("forward", "backward"):
            record["apart"][part] = [asdict(launch) for launch in getattr(apart, part).launches]
    return record


def _show(found: "Explanation", asked: dict[str, Any], console: Console) -> None:
    outputs = " + ".join(map(str, [asked["outputs"], *asked.get("sharing", ())]))
    sizes = f"{asked['rows']} × {asked['inputs']} × {outputs}"
    dropout = f", dropout {asked['dropout']:g}" if asked["dropout"] else ""
    if asked["weight"] != Weight.dense:
        dropout += f", over a weight in {asked['weight']} ({asked['weight_bytes'] / 2**20:,.1f} MiB)"
    console.print(
        f"{asked['op']} on {asked['gpu']}, {sizes} (rows × inputs × outputs), "
        f"rank {asked['rank']}, {asked['dtype']}{dropout}. Every time below is predicted, not measured."
    )
    console.print(_launch_table(found))
    console.print(
        f"Predicted {found.predicted_us:,.0f} µs a step, forward and backward; the ceiling is "
        f"{found.ceiling_us:,.0f} µs: {found.overhead:.2f}×."
    )
    if found.apart is not None:
        console.print(
            f"The same layers one by one, and autograd's sums: {found.apart.predicted_us:,.0f} µs, "
            f"{found.apart.predicted_us / found.predicted_us:.2f}× as long."
        )
    if found.tile is not None:
        tile = found.tile
        console.print(
            f"Tile of the large product: {tile.rows} × {tile.cols} × {tile.depth}, "
            f"{tile.rank} ranks at a time, {tile.warps} warps, {tile.stages} stages"
            f"{', persistent' if tile.persistent else ''}."
        )
    for part, candidates in found.rejected.items():
        for each in candidates:
            console.print(f"Not {each.path} {part}: {_reason(found, part, each)}.", style="dim")


def _launch_table(found: "Explanation") -> Table:
    table = Table()
    table.add_column("Pass")
    table.add_column("Launch")
    for heading in ("µs", "MiB moved", "GFLOP"):
        table.add_column(heading, justify="right")
    table.add_column("Bound by")
    for part in ("forward", "backward"):
        candidate = getattr(found, part)
        for number, launch in enumerate(candidate.launches):
            title = "" if number else f"{part}, {candidate.path}"
            name = launch.name + (f" ({launch.count} launches)" if launch.count > 1 else "")
            amounts = (launch.microseconds, launch.bytes / 2**20, launch.flops / 1e9)
            table.add_row(title, name, *(f"{value:,.1f}" for value in amounts), launch.bound)
    table.add_section()
    for title, each in (("both", found), ("both, one by one", found.apart)):
        if each is not None:
            count = f"{sum(launch.count for launch in each.launches)} launches"
            amounts = (each.predicted_us, each.bytes / 2**20, each.flops / 1e9)
            formatted = (f"{value:,.1f}" for value in amounts)
            table.add_row(title, count, *formatted, "launches and gaps included")
    return table


def _reason(found: "Explanation", part: str, rejected: Any) -> str:
    if rejected.refused and not rejected.launches:
        return str(rejected.refused)
    best = getattr(found, part).microseconds
    return f"predicted {rejected.microseconds:,.0f} µs instead of {best:,.0f}"
