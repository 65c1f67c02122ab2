"""Exit codes, and one line instead of a traceback for the errors a user can do something about."""

import logging
from typing import Any

import typer
from typer.core import TyperGroup

from fastlora._words import visible

FAILURE, BAD_INPUT = 1, 2

_BAD_INPUT = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)
_FAILURES = (ImportError, FloatingPointError, OSError)


class CommandGroup(TyperGroup):
    """Commands whose expected errors end with one line on stderr: exit code 2 for bad input, else 1."""

    # typer's context class has moved between its versions
    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        log, told = logging.getLogger("fastlora"), _ToldWarnings(logging.WARNING)
        log.addHandler(told)
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # who reads our output has enough of it, which typer takes for no error
            raise
        except _BAD_INPUT as error:
            raise _told(error, BAD_INPUT) from error
        except _FAILURES as error:
            raise _told(error, FAILURE) from error
        finally:
            log.removeHandler(told)


class _ToldWarnings(logging.Handler):
    """The library's warnings as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        typer.echo(f"{record.levelname.lower()}: {visible(record.getMessage())}", err=True)


def _told(error: Exception, code: int) -> typer.Exit:
    typer.echo(f"error: {visible(error)}", err=True)
    return typer.Exit(code)
