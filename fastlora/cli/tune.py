"""``fastlora tune``: measure every candidate on this GPU, and keep the fastest for every later run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastlora._core.words import visible
from fastlora.cli._console import make_console
from fastlora.cli._progress import LiveReporter
from fastlora.cli._weight import Weight
from fastlora.cli.plan import Dtype

if TYPE_CHECKING:
    import torch

    from fastlora.tuning.calls import Call
    from fastlora.tuning.search import LeftOut
    from fastlora_kernels.choose.tuned import AnyRecord, Record, SharedRecord, Winners
    from fastlora_kernels.tile import Shape


def tune(
    shapes: Annotated[
        Path | None,
        typer.Option(
            help='JSON list of calls: [{"rows": 8192, "inputs": 4096, "outputs": 4096, "rank": 16}]; '
            'with "sharing": [1024, 1024] further layers on the same input, as in fastlora plan.'
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead, any model of fastlora finetune, or llama-7b.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of a model's updates.")] = 16,
    dropout: Annotated[
        float, typer.Option(min=0, max=0.99, help="Probability of dropout in a model's updates.")
    ] = 0.0,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of a model's layers.")] = Dtype.bfloat16,
    weight: Annotated[
        Weight,
        typer.Option(
            help="How a model's frozen weights are stored, as in fastlora plan; a listed call has its own."
        ),
    ] = Weight.dense,
    batch_size: Annotated[int, typer.Option(min=1, help="Images or texts in a model's batch.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens in a text.")] = 512,
    show: Annotated[
        bool, typer.Option("--show", help="Print what was measured earlier, and measure nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the choices as JSON on stdout.")] = False,
) -> None:
    """Time every path and tile of LoRA layers on this GPU, eager PyTorch included, and keep the fastest.

    Each candidate is checked against float64 (the gradients of A and B whole, y and the input's gradient on
    512 rows), then timed twice: as a CUDA graph with a cold cache, and where Python launches every kernel.
    What wins is kept for both, in the user's cache folder (FASTLORA_CACHE moves it), for this GPU and
    version; from then on calls of these layers, with up to twice or half the rows, take it: in eager mode the
    one, in CUDA graphs and compiled ones the other. What was kept for other layers stays.

    Of layers that share their input the backward pass is timed, too: together, and one by one with what won
    for each. A model's are those that fastlora.accelerate would find, with dense weights.

    [bold]Example[/bold]: fastlora tune --model vit_b_16 --batch-size 64 --dropout 0.1
    """
    # slow to import
    from fastlora.ops import tuned_file

    device = _device()
    gpu = tuned_file.gpu_key(device)
    if show:
        _print(_kept(gpu), as_json)
        return
    console = make_console(to_stderr=True)
    asked = _calls(shapes, model, rank, dropout, dtype.value, weight, batch_size, sequence_length)
    calls = _with_kernels(asked, device, console)
    records, left_out = _tune(calls, device, gpu, console)
    _print(records, as_json)
    for where, each in left_out:
        typer.echo(f"left out: {where}: {each.candidate}: {visible(each.reason)}", err=True)
    # what doesn't fit this GPU is no failure, a kernel that fails or computes something else is
    if any(each.wrong for _, each in left_out):
        raise typer.Exit(1)


def _kept(gpu: str) -> "list[AnyRecord]":
    from fastlora.ops import tuned_file

    path = tuned_file.path_of(gpu)
    try:
        return tuned_file.read(path, gpu)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"nothing was measured for {gpu} so far: there is no {path}") from error


def _device() -> "torch.device":
    import torch

    from fastlora._core.backend import triton_available

    if not torch.cuda.is_available() or not triton_available():
        raise ImportError(
            "tuning measures on an NVIDIA or AMD GPU with Triton, and there is none here; "
            "fastlora plan predicts for GPUs that are elsewhere"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _calls(
    shapes: Path | None,
    model: str | None,
    rank: int,
    dropout: float,
    dtype: str,
    weight: Weight,
    batch_size: int,
    sequence_length: int,
) -> "list[Call]":
    from fastlora.transfer.models.weightless import ModelSpec, build, sample_input
    from fastlora.tuning.calls import calls_of_model, read_calls

    if (shapes is None) == (model is None):
        raise ValueError("expected either --shapes FILE or --model NAME; fastlora tune --help shows both")
    if shapes is not None:
        return read_calls(shapes)
    assert model is not None
    spec = ModelSpec(model, None, dtype, batch_size, sequence_length)
    # no weights are held
    built = build(spec)
    stored: Any = None if weight is Weight.dense else weight.value
    noted: Any = {"rank": rank, "dropout": dropout, "dtype": dtype, "weight": stored}
    return calls_of_model(built, sample_input(spec, built), **noted)


def _with_kernels(calls: "list[Call]", device: "torch.device", console: Console) -> "list[Call]":
    from fastlora.tuning.calls import SharedCall
    from fastlora.tuning.shared import choices_of
    from fastlora_kernels import targets
    from fastlora_kernels.choose import paths

    target = targets.detect(device)
    kept: list[Call] = []
    for call in calls:
        if isinstance(call, SharedCall):
            serves, why = len(choices_of(call, device)) > 1, "always computed one by one"
        else:
            serves, why = paths.has_kernels(call.shape, target), "always takes library products"
        if serves:
            kept.append(call)
        else:
            console.print(f"{_sizes(call.shapes)}, rank {_ranks(call.shapes)}: {why}, not tuned")
    if not kept:
        raise ValueError(
            f"expected a call that the kernels serve on this GPU ({target.name}), got none of {len(calls)}; "
            "sizes have to be multiples of 16, ranks above 16 as well"
        )
    return kept


def _sizes(shapes: "Sequence[Shape]") -> str:
    """Rows, inputs and the outputs of each layer."""
    return f"{shapes[0].m} × {shapes[0].k} × {' + '.join(str(shape.n) for shape in shapes)}"


def _ranks(shapes: "Sequence[Shape]") -> str:
    """One for all, or each layer's."""
    ranks = [str(shape.r) for shape in shapes]
    return " + ".join(ranks) if len({*ranks}) > 1 else ranks[0]


def _tune(
    calls: "list[Call]", device: "torch.device", gpu: str, console: Console
) -> "tuple[list[AnyRecord], list[tuple[str, LeftOut]]]":
    from fastlora.ops.tuned_file import keep
    from fastlora.tuning.calls import SharedCall
    from fastlora.tuning.search import tune_call
    from fastlora.tuning.shared import tune_shared
    from fastlora.tuning.timing import gpu_timer

    timer = gpu_timer(device)
    records: list[AnyRecord] = []
    left_out: list[tuple[str, LeftOut]] = []
    with LiveReporter(console) as reporter:
        for done, call in enumerate(calls):
            where = _sizes(call.shapes)

            def tell(what: str, done: int = done, where: str = where) -> None:
                reporter.show("tuning", done, len(calls), f"{where}: {what}")

            record: AnyRecord | None
            if isinstance(call, SharedCall):
                record, problems = tune_shared(call, device, timer, tell)
            else:
                record, problems = tune_call(call, device, timer, tell)
            left_out += [(where, each) for each in problems]
            if record is not None:
                # at once, so that a crash later loses nothing
                keep(record, gpu)
                records.append(record)
            reporter.show("tuning", done + 1, len(calls))
    return records, left_out


def _print(records: "list[AnyRecord]", as_json: bool) -> None:
    from fastlora_kernels.choose.tuned import Record, SharedRecord

    if as_json:
        typer.echo(json.dumps([asdict(record) for record in records], indent=1))
        return
    console = make_console()
    console.print(_table([record for record in records if isinstance(record, Record)]))
    shared = [record for record in records if isinstance(record, SharedRecord)]
    if shared:
        console.print(_shared_table(shared))


def _table(records: "list[Record]") -> Table:
    table = Table(
        caption="Medians: graph, of CUDA graphs with a cold cache; host, where Python launches every kernel. "
        "Shape: rows × inputs × outputs."
    )
    for heading in ("Shape", "Rank", "Dtype", "Weight", "Dropout", "Run", "Forward", "Backward"):
        table.add_column(heading)
    for heading in ("µs", "Eager µs", "Gain"):
        table.add_column(heading, justify="right")
    for record in records:
        for run, won in (("graph", record.in_graph), ("host", record.from_host)):
            if won is not None:
                table.add_row(*_cells(record, run, won))
    return table


def _shared_table(records: "list[SharedRecord]") -> Table:
    from fastlora.tuning.search import name_of

    table = Table(
        caption="Layers that share their input, backward. One by one: each as it is alone, and their sums."
    )
    for heading in ("Shape", "Rank", "Dtype", "Dropout", "Run", "Backward"):
        table.add_column(heading)
    for heading in ("µs", "One by one", "Gain"):
        table.add_column(heading, justify="right")
    for record in records:
        named = (_sizes(record.shapes), _ranks(record.shapes), record.dtype, "yes" if record.dropping else "")
        for run, won in (("graph", record.in_graph), ("host", record.from_host)):
            us = record.microseconds[run]
            best, apart = us[name_of(won)], us.get("separate")
            gain = ("", "") if apart is None else (f"{apart:,.0f}", f"{apart / best:.2f}×")
            table.add_row(*named, run, name_of(won), f"{best:,.0f}", *gain)
    return table


def _cells(record: "Record", run: str, won: "Winners") -> list[str]:
    from fastlora.tuning.search import name_of

    shape, step = record.shape, won.microseconds["step"]
    best, eager = min(step.values()), step.get("eager")
    return [
        _sizes([shape]),
        str(shape.r),
        record.dtype,
        record.weight or "dense",
        "yes" if record.dropping else "",
        run,
        name_of(won.forward),
        name_of(won.backward),
        f"{best:,.0f}",
        "" if eager is None else f"{eager:,.0f}",
        "" if eager is None else f"{eager / best:.2f}×",
    ]
