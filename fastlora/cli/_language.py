"""What ``fastlora demo`` prints of a language model."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show_language(console: Console, report: dict[str, Any], output: Path) -> None:
    """Print the comparison, an answer before and after, and what was written."""
    console.print(_table(report))
    entry, (own, ours) = report["answers"][0], report["methods"]
    console.print(f"Asked: {entry['question']}")
    console.print(f"Before: {entry['before']}")
    console.print(f"After: {entry[ours['title']]}")
    ratio = report["peft_over_accelerated"]
    if ratio is not None:
        console.print(
            f"PEFT takes {own['median_step_seconds']:.3f} s a step, accelerated "
            f"{ours['median_step_seconds']:.3f} s: {ratio:.2f}x, medians of steps in turns."
        )
    console.print(f"Their losses differ by at most {report['largest_loss_difference']:.1g}.")
    written = f"report.html, report.json, losses.png, {report['adapter_folder']}/"
    console.print(f"Wrote {written} to {output} after {report['total_seconds']:.0f} s in all.")


def _table(report: dict[str, Any]) -> Table:
    dialogues, recipe = report["dialogues"], report["recipe"]
    caption = (
        f"{dialogues['train']} training and {dialogues['test']} test dialogues, "
        f"{report['methods'][0]['steps']} steps of {recipe['tokens']} tokens, "
        f"LoRA r = {recipe['rank']} on all linear layers but the head, "
        f"seed {recipe['seed']}, {report['device_name']} in {report['precision']}."
    )
    table = Table(title=report["model"], caption=caption)
    table.add_column("")
    for column in ("before", *(method["title"] for method in report["methods"])):
        table.add_column(column, justify="right")
    before, methods = report["perplexity_before"], report["methods"]
    table.add_row("Test perplexity", f"{before:.2f}", *(f"{m['perplexity']:.2f}" for m in methods))
    table.add_row("Seconds a step", "-", *(f"{m['median_step_seconds']:.3f}" for m in methods))
    table.add_row(
        "Peak memory of a step", "-", *(f"{m['peak_memory_bytes'] / 2**20:,.0f} MiB" for m in methods)
    )
    table.add_row("Last loss", "-", *(f"{m['losses'][-1]:.3f}" for m in methods))
    return table
