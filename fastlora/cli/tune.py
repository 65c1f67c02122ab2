"""``fastlora tune``: measure every candidate on this GPU, and keep the fastest for every later run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fastlora._core.words import visible
from fastlora.cli._console import make_console
from fastlora.cli._progress import LiveReporter
from fastlora.cli._tuned import print_records, ranks, sizes
from fastlora.cli._weight import Weight
from fastlora.cli.plan import Dtype

if TYPE_CHECKING:
    import torch

    from fastlora.tuning.calls import Call
    from fastlora.tuning.search import LeftOut
    from fastlora_kernels.choose.tuned import AnyRecord


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
    for each. A model's are those that fastlora.accelerate would find with every linear layer adapted, with
    dense weights; list others with "sharing".

    [bold]Example[/bold]: fastlora tune --model vit_b_16 --batch-size 64 --dropout 0.1
    """
    # slow to import
    from fastlora.ops import tuned_file

    device = _device()
    gpu = tuned_file.gpu_key(device)
    if show:
        print_records(_kept(gpu), as_json)
        return
    console = make_console(to_stderr=True)
    asked = _calls(shapes, model, rank, dropout, dtype.value, weight, batch_size, sequence_length)
    calls = _with_kernels(asked, device, console)
    records, left_out = _tune(calls, device, gpu, console)
    print_records(records, as_json)
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
            serves, why = len(choices_of(call, device)) > 1, "no kernel to choose"
        else:
            serves, why = paths.has_kernels(call.shape, target), "always takes library products"
        if serves:
            kept.append(call)
        else:
            console.print(f"{sizes(call.shapes)}, rank {ranks(call.shapes)}: {why}, not tuned")
    if not kept:
        raise ValueError(
            f"expected a call that the kernels serve on this GPU ({target.name}), got none of {len(calls)}; "
            "sizes have to be multiples of 16, ranks above 16 as well"
        )
    return kept


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
            where = sizes(call.shapes)

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
