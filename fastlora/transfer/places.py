"""Whether pictures and finished runs are where they are said to be; told before anything slow is imported."""

from pathlib import Path

MODEL = "model.json"


def is_list(place: Path) -> bool:
    """Whether a path is that of a list of pictures and classes."""
    return place.suffix.lower() in (".csv", ".tsv")


def check_labelled(place: Path) -> None:
    """See that there is something that can hold labelled pictures.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: There is a file of another kind.
    """
    if place.is_dir() or (place.is_file() and is_list(place)):
        return
    if place.is_file():
        raise ValueError(f"expected a folder of class folders or a .csv file, got the file {place}")
    raise FileNotFoundError(f"expected a folder of class folders or a .csv file, found nothing at {place}")


def check_pictures(place: Path) -> None:
    """See that there is a file, or a folder that may hold some.

    Raises:
        FileNotFoundError: There is nothing.
    """
    if not place.exists():
        raise FileNotFoundError(f"expected a picture or a folder of pictures, found nothing at {place}")


def check_run(folder: Path) -> None:
    """See that a folder holds a finished run.

    Raises:
        FileNotFoundError: It doesn't.
    """
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(
            f"expected the folder of a finished run, found no {MODEL} in {folder}; "
            "fastlora finetune writes it at its end"
        )
