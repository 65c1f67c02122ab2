"""``fastlora export``: a fine-tuned model in another format, checked."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli._console import make_console


class Format(StrEnum):
    """What to write."""

    state_dict = "state_dict"
    onnx = "onnx"
    torch = "torch"


def export(
    run: Annotated[Path, typer.Argument(help="Folder that fastlora finetune wrote.")],
    format: Annotated[
        Format,
        typer.Option(help="Plain weights with LoRA merged (safetensors), ONNX, or a torch.export program."),
    ] = Format.onnx,
    output: Annotated[
        Path | None, typer.Option(help="File to write; in the run's folder without it.")
    ] = None,
) -> None:
    """Write a fine-tuned model in another format, and check that it answers the same.

    [bold]Example[/bold]: fastlora export flowers-lora --format onnx --output flowers.onnx
    """
    from fastlora.transfer.places import check_run

    check_run(run)
    # models are slow to import
    from fastlora.transfer.finetune.export import export_run

    agreement = export_run(run, format.value, output)
    make_console().print(
        f"Wrote {agreement.path}. Its logits are {agreement.error:.1e} of the largest off from float64, the "
        f"model's own {agreement.eager_error:.1e}; "
        f"{'both name the same classes.' if agreement.same_answers else 'near ties are named otherwise.'}",
        soft_wrap=True,
    )
