"""Exit codes, and one line in the words of the command instead of a traceback, for what a user can mend."""

import logging
import re
import shlex
import signal
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import typer
from typer.core import TyperGroup

from fastlora._core.files import no_room
from fastlora._core.interruption import Interrupted, raise_on_sigterm
from fastlora._core.words import visible

FAILURE, BAD_INPUT = 1, 2
# what a shell adds to the number of the signal that ended a command
_SIGNALLED = 128

_BAD_INPUT = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_FAILURES = (ImportError, FloatingPointError, OSError, MemoryError)
_ARGUMENTS = "fastlora.arguments"

# what is said of a number or a choice, after the name of its parameter
_SAID = (
    r"(?= (?:above|below|from|between|out of|of at least|of at most|of 0 or more|as an? |to be |in [\[(]|>"
    r"|for|and |was ))"
)
_VALUE = r"""("[^"]*"|'[^']*'|[\w.+-]*\w)"""
_ENDS = r"(?<![\w/.'\"-]){}(?![\w/'\"=-]|\.\w)"
# parameters that are no words of English: wherever they stand, the option is meant
_ABBREVIATIONS = ("lr", "ema", "mixup")


class CommandGroup(TyperGroup):
    """Commands whose expected errors end with one line on stderr.

    Exit code 2 for bad input, 130 and 143 for Ctrl-C and SIGTERM, 1 for other failures. The line speaks of
    options, not of parameters, and says how to go on where a command can.
    """

    # typer's context class has moved between its versions
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep what was typed, to say how to go on."""
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        before = raise_on_sigterm()
        log, told = logging.getLogger("fastlora"), _ToldWarnings(logging.WARNING)
        log.addHandler(told)
        try:
            _check_typed(ctx.meta[_ARGUMENTS])
            return super().invoke(ctx)
        except BrokenPipeError:
            # who reads our output has enough of it, which typer takes for no error
            raise
        except KeyboardInterrupt as error:
            raise self._stopped(ctx, error) from error
        except _BAD_INPUT as error:
            raise self._told(ctx, error, BAD_INPUT) from error
        except _FAILURES as error:
            raise self._told(ctx, error, FAILURE) from error
        except OverflowError as error:
            text = ValueError(f"expected numbers that a computer can count to, got a larger one ({error})")
            raise self._told(ctx, text, BAD_INPUT) from error
        except RuntimeError as error:
            if (told_of := of_another_torch(error)) is not None:
                raise self._told(ctx, ImportError(told_of), FAILURE) from error
            if not _out_of_memory(error):
                raise
            # an accelerator may be full of other things; a host refuses only what it can never hold
            code = FAILURE if type(error).__name__ == "OutOfMemoryError" else BAD_INPUT
            raise self._told(ctx, MemoryError(_first_line(error)), code) from error
        finally:
            log.removeHandler(told)
            if before is not None:
                signal.signal(signal.SIGTERM, before)

    def _stopped(self, ctx: Any, error: KeyboardInterrupt) -> typer.Exit:
        number, done = signal.SIGINT, ""
        if isinstance(error, Interrupted):
            number, done = signal.Signals(error.number), error.text
        said = f"interrupted by {number.name}{f': {done}' if done else ''}"
        typer.echo(f"{said}{self._how_to_go_on(ctx)}", err=True)
        return typer.Exit(_SIGNALLED + number)

    def _told(self, ctx: Any, error: Exception, code: int) -> typer.Exit:
        text = in_options(_text(error), options_of_command(self._command(ctx)))
        if isinstance(error, OSError) and no_room(error):
            text += ("" if "make room" in text else "; make room") + self._how_to_go_on(ctx)
        typer.echo(f"error: {visible(text)}", err=True)
        return typer.Exit(code)

    def _how_to_go_on(self, ctx: Any) -> str:
        if not any(parameter.name == "resume" for parameter in self._command(ctx).params):
            return ""
        typed = ctx.meta[_ARGUMENTS]
        return f"; go on with: fastlora {shlex.join(typed)}{'' if '--resume' in typed else ' --resume'}"

    def _command(self, ctx: Any) -> Any:
        """The command that was typed."""
        found = (self.get_command(ctx, each) for each in ctx.meta[_ARGUMENTS])
        return next((command for command in found if command is not None), self)


class _ToldWarnings(logging.Handler):
    """The library's warnings as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        typer.echo(f"{record.levelname.lower()}: {visible(record.getMessage())}", err=True)


def _check_typed(arguments: list[str]) -> None:
    """Refuse empty texts, which would stand for this folder, and integers that no computer counts to."""
    for before, given in zip(["", *arguments], arguments, strict=False):
        name, _, value = given.partition("=") if given.startswith("--") else (before, "", given)
        what = name if name.startswith("--") else "every argument"
        if not value.strip() and (given != name or not given):
            raise ValueError(f"expected a value for {what}, got an empty text")
        if re.fullmatch(r"[+-]?\d{19,}", value) and name.startswith("--"):
            raise ValueError(f"expected a smaller number for {what}, got {value}; it has {len(value)} digits")


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        # without the number in front of it
        where = "" if error.filename is None else f": {error.filename}"
        return f"{error.strerror}{where}"
    if isinstance(error, MemoryError):
        return (
            f"expected sizes that fit into memory, got too large ones ({error or 'no memory left'}); "
            "lower what makes them large, such as the batch size or the size of the pictures"
        )
    return str(error)


def _out_of_memory(error: RuntimeError) -> bool:
    # torch has an error of its own for accelerators alone
    words = ("out of memory", "can't allocate memory", "not enough memory", "calculation overflowed")
    return type(error).__name__ == "OutOfMemoryError" or any(each in str(error) for each in words)


def of_another_torch(error: Exception) -> str | None:
    """What to do about a torchvision that can't be imported beside the torch that is here; None for others.

    Args:
        error: What importing torchvision raised.
    """
    if not re.search(r"operator torchvision::|undefined symbol|Couldn't load custom C\+\+ ops", str(error)):
        return None
    # torchvision has imported it by now
    import torch

    return (
        f"torchvision {version('torchvision')} was built for another torch than {torch.__version__}, and "
        "can't be imported; install the two together from one index, as https://pytorch.org/get-started says"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def options_of_command(command: Any) -> dict[str, tuple[str, str | None]]:
    """Each parameter's option, and the option that switches it off, if it is a flag with one."""
    found = {}
    for parameter in command.params:
        names = [name for name in parameter.opts if name.startswith("--")]
        if names:
            off = next(iter(parameter.secondary_opts), None)
            found[str(parameter.name)] = (names[0], off)
    return found


def in_options(text: str, options: Mapping[str, tuple[str, str | None]]) -> str:
    """An error's text with the names of parameters as options.

    Args:
        text: Written for the Python interface.
        options: Each parameter's option and the one that switches it off, from :func:`options_of_command`.

    Example:
        >>> known = {"batch_size": ("--batch-size", None), "weights": ("--weights", None)}
        >>> in_options("expected batch_size of at least 1, got 0", known)
        'expected --batch-size of at least 1, got 0'
        >>> in_options("take random weights with weights=None", known)
        'take random weights with --weights none'
    """
    for name, (option, off) in options.items():
        text = re.sub(rf"(?<![\w/.-]){name}={_VALUE}", partial(_given, option, off), text)
        text = re.sub(rf"(?:options? )?'{name}'(?= for strategy)", option, text)
        text = re.sub(
            rf"(?:(?<=expected )|(?<=lower )|(?<=; )|(?<=, but )|(?<=^)){name}{_SAID}", option, text
        )
        text = re.sub(rf"(?<=as ){name}(?=[,;])", option, text)
        if "_" in name or name in _ABBREVIATIONS:
            text = re.sub(_ENDS.format(name), option, text)
    if "strategy" in options:
        text = re.sub(r"(?<![\w/.-])strategy '(\w+)'", r"--strategy \1", text)
    return text


def _given(option: str, off: str | None, found: re.Match[str]) -> str:
    value = found[1].strip("'\"")
    if value == "True":
        return option
    if value == "False":
        return off or f"no {option}"
    return f"{option} {'none' if value == 'None' else value}"
