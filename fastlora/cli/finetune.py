"""``fastlora finetune``: from labelled pictures to a fine-tuned model and its report."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastlora.cli._console import conclude, make_console
from fastlora.cli._options import ConfigOption, JsonOption, ResumeOption, settings_of, with_options
from fastlora.cli._progress import LiveReporter

if TYPE_CHECKING:
    from fastlora.transfer.finetune.job import Job

# classes of a plan
_NAMED = 12


def finetune(
    config: ConfigOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would train, memory and advice; train nothing.")
    ] = False,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
    **values: Any,
) -> None:
    """Fine-tune a pretrained model on a folder of labelled pictures.

    Writes the model, report.html, report.json, config.toml, logs and checkpoints into the output folder. Look
    first: --dry-run shows what would train, what memory it takes and which strategy is advised. Several
    processes: accelerate launch -m fastlora.cli finetune ...

    [bold]Examples[/bold]: fastlora finetune flowers --model resnet50 --strategy fine_tuning --dry-run

    fastlora finetune flowers --strategy lora --rank 8 --epochs 5 --output flowers-lora

    fastlora finetune --config flowers-lora/config.toml --resume
    """
    from fastlora.transfer.finetune.settings import FinetuneSettings
    from fastlora.transfer.places import check_labelled
    from fastlora.transfer.training.settings import TrainSettings

    settings, training = settings_of((FinetuneSettings, TrainSettings), values)
    for place in filter(None, (settings.data, settings.validation, settings.test)):
        check_labelled(Path(place))
    console = make_console(to_stderr=as_json)
    if dry_run:
        _plan(settings, training, console, as_json)
        return
    # models are slow to import
    from fastlora.transfer.finetune.run import finetune as run

    with LiveReporter(console) as reporter:
        report = run(settings, training, reporter, resume=resume)
    conclude(report, lambda: _show(report, settings.output, console), as_json=as_json)


def make_command() -> Callable[..., None]:
    """The command with an option for every setting."""
    from fastlora.transfer.finetune.settings import FinetuneSettings
    from fastlora.transfer.training.settings import TrainSettings

    return with_options(finetune, (FinetuneSettings, TrainSettings), arguments=("data",))


def _plan(settings: Any, training: Any, console: Console, as_json: bool) -> None:
    from fastlora.transfer.finetune.job import prepare
    from fastlora.transfer.finetune.record import job_record

    with LiveReporter(console) as reporter:
        job = prepare(settings, training, reporter)
    report, rows = job.parameters(), _plan_rows(job, settings.output)
    record = {"model": settings.model, **job_record(job), "parameters": report.as_json(), "plan": rows}
    conclude(record, lambda: _show_plan(record, str(report), console), as_json=as_json)


def _show_plan(record: dict[str, Any], parameters: str, console: Console) -> None:
    table = Table(title=f"{record['model']}, {record['strategy']}", show_header=False)
    for heading, text in record["plan"].items():
        table.add_row(heading, text)
    console.print(table)
    console.print(Text(parameters), soft_wrap=True)
    advice = record["recommendation"]
    console.print(
        f"Advice for these data: {advice['strategy']}. {advice['reason']} "
        f"Sources: {'; '.join(advice['sources'])}"
    )


def _plan_rows(job: "Job", output: str) -> dict[str, str]:
    training, count, classes = job.training, len(job.train), job.train.classes
    more = ", …" if len(classes) > _NAMED else ""
    test = 0 if job.test is None else len(job.test)
    rows = {
        "Trains": job.strategy.summary,
        "Classes": f"{len(classes)}: {', '.join(classes[:_NAMED])}{more}",
        "Pictures": f"{count:,} training, {len(job.validation):,} validation, {test:,} test",
        "Steps": f"{training.total_steps(count):,}: {training.epochs} epochs of "
        f"{training.steps_per_epoch(count):,}, {training.batch_size} pictures each",
        "Learning rate": f"{training.lr:g}, head {training.lr * training.head_factor:g}, {training.schedule}",
        "Output": output,
    }
    if job.unfreezing is not None:
        rows["Stages unfreeze"] = f"at epochs {', '.join(str(at + 1) for at in job.unfreezing.at)}"
    return rows


def _show(report: dict[str, Any], output: str, console: Console) -> None:
    if report.get("unchanged"):
        # the reporter has said so
        return
    from fastlora._core.text import readable_percent

    scores, parameters = report["evaluation"], report["parameters"]
    table = Table(title=f"{report['model']}, {report['strategy']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("Pictures", f"{scores['pictures']:,} of {report['evaluated_on']}")
    low, high = scores["accuracy_interval"]
    table.add_row("Accuracy (95 % interval)", f"{scores['accuracy']:.1%} ({low:.1%} to {high:.1%})")
    table.add_row("Balanced accuracy", f"{scores['balanced_accuracy']:.1%}")
    trained, percent = parameters["trainable_parameters"], parameters["trainable_percent"]
    table.add_row("Trainable parameters", f"{trained:,} ({readable_percent(percent)} %)")
    table.add_row("Training seconds", f"{report['seconds']:.1f}")
    table.add_row("Best epoch", f"{report['best_epoch']} of {len(report['epochs'])}")
    console.print(table)
    console.print(
        f"Wrote {', '.join(report['files'])}, report.html, report.json, config.toml and logs to {output}."
    )
