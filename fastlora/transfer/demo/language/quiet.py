"""Other libraries' remarks and bars, which would run into our own progress, kept still for a while."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

_TALKERS = ("torch", "bitsandbytes", "transformers", "trl", "peft", "accelerate")


@contextlib.contextmanager
def errors_alone() -> Iterator[None]:
    """No warnings inside the block, and of other libraries' logs errors alone, as they are imported too."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars of transformers and datasets inside the block."""
    import datasets
    import transformers

    # without types
    bars: Any = transformers.utils.logging
    shown, data_shown = bars.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    bars.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
        if data_shown:
            datasets.enable_progress_bars()
