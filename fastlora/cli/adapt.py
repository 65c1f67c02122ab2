"""``fastlora adapt``: from labelled pictures to a model for another domain, which has no labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastlora.cli._console import conclude, make_console
from fastlora.cli._options import ConfigOption, JsonOption, ResumeOption, settings_of, with_options
from fastlora.cli._progress import LiveReporter


def adapt(
    config: ConfigOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
    **values: Any,
) -> None:
    """Adapt a pretrained model from labelled pictures to another domain without labels.

    The target's labels, if its folder has class folders, are never trained on nor chosen by; they only show
    how good the model is (the oracle). Look first at fastlora diagnose, and compare with --method
    source_only: adaptation can hurt. With --cache-features only a layer on frozen features is trained, in
    seconds; with --strategy lora the low-rank updates of the whole model are.

    [bold]Examples[/bold]: fastlora adapt --source photos --target drawings --method mmd --cache-features

    fastlora adapt --source photos --target drawings --method dann --strategy lora --epochs 5 --output drawn
    """
    from fastlora.transfer.places import check_labelled, check_pictures

    domain, settings, training = settings_of(_kinds(), values, data=values["source"])
    check_labelled(Path(domain.source))
    check_pictures(Path(domain.target))
    # models are slow to import
    from fastlora.domain.training.run import adapt as run

    console = make_console(to_stderr=as_json)
    with LiveReporter(console) as reporter:
        report = run(domain, settings, training, reporter, resume=resume)
    conclude(report, lambda: _show(report, settings.output, console), as_json=as_json)


def make_command() -> Callable[..., None]:
    """The command with an option for every setting."""
    from fastlora.domain.training.settings import UNUSED

    return with_options(adapt, _kinds(), leave_out=UNUSED)


def _kinds() -> tuple[type, ...]:
    from fastlora.domain.training.settings import DomainSettings
    from fastlora.transfer.finetune.settings import FinetuneSettings
    from fastlora.transfer.training.settings import TrainSettings

    return DomainSettings, FinetuneSettings, TrainSettings


def _show(report: dict[str, Any], output: str, console: Console) -> None:
    if report.get("unchanged"):
        # the reporter has said so
        return
    table = Table(title=f"{report['model']}, {report['method_title']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("Source, held out", f"{report['source_accuracy']:.1%}")
    for name, text in (("kept", "kept"), ("last", "last"), ("oracle", "best by target labels")):
        if report["target"] is not None:
            row = report["target"][name]
            balanced = f"{row['accuracy']:.1%} (balanced {row['balanced_accuracy']:.1%})"
            table.add_row(f"Target, epoch {row['epoch']}, {text} (oracle)", balanced)
    distance = report["a_distance"]
    table.add_row("Proxy A-distance", f"{distance['before']:.2f} → {distance['after']:.2f}")
    if report["effective_sample_size"] is not None:
        table.add_row("Effective source pictures", f"{report['effective_sample_size']:.0f}")
    table.add_row("Training seconds", f"{report['seconds']:.1f}")
    console.print(table)
    console.print(
        f"Epoch {report['best_epoch']} of {len(report['epochs'])} was kept by {report['config']['select']}. "
        f"Wrote {', '.join(report['files'])}, report.html, report.json, embedding.png, config.toml and logs "
        f"to {output}."
    )
