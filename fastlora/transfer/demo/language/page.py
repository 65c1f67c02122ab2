"""``report.html`` of the demo: one page with everything in it, and its figure."""

from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import MaxNLocator

from fastlora.transfer.report.page import page
from fastlora.transfer.report.style import SERIES, heading, headline, new_figure, plain, png

_TEMPLATE = "transfer/demo/language/report.html.jinja"
# the first curve is wide and lies below the second, which would hide it
_WIDTHS, _DASHES = (5.0, 1.5), ("-", "--")


def render(report: Mapping[str, Any], losses: bytes) -> str:
    """The page.

    Args:
        report: What ``report.json`` holds.
        losses: What :func:`draw_losses` has drawn of it.
    """
    return page(_TEMPLATE, report=report, losses=losses)


def draw_losses(report: Mapping[str, Any]) -> bytes:
    """The loss and the seconds of every step, of both, as a PNG.

    Args:
        report: What ``report.json`` holds.
    """
    figure = new_figure(10, 4.2)
    loss, seconds = figure.subplots(1, 2)
    for method, (colour, _, _), width, dashes in zip(
        report["methods"], SERIES, _WIDTHS, _DASHES, strict=False
    ):
        numbers = range(1, len(method["losses"]) + 1)
        line: dict[str, Any] = {"color": colour, "linewidth": width, "linestyle": dashes}
        loss.plot(numbers, method["losses"], label=method["title"], **line)
        told = f"{method['title']}: median {method['median_step_seconds']:.2f} s"
        seconds.plot(numbers, method["step_seconds"], label=told, **line | {"linewidth": 1.5})
    heading(loss, "Training loss")
    loss.set(ylabel="Cross-entropy of the answers (nats)")
    heading(seconds, "Time of a step")
    seconds.set(ylabel="Seconds", ylim=(0, None))
    for axes in (loss, seconds):
        axes.set(xlabel="Step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        plain(axes)
        axes.legend(fontsize=9)
    headline(figure, report["model"])
    return png(figure)
