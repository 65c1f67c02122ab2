"""``tune`` with a timer that counts: who wins is known before."""

from collections.abc import Callable
from itertools import count

from fastlora.tuning import search, timing
from fastlora.tuning.calls import LayerCall
from fastlora.tuning.timing import Times
from fastlora_kernels.choose.tuned import Record
from tests.tuning_models import device


def counting_timer(first: float, step: float, from_host: float = 0.0) -> timing.Timer:
    """Later candidates take longer, or shorter with a negative step; the work is done all the same.

    Args:
        first: Microseconds of the first.
        step: What each takes more than the one before.
        from_host: What each takes more than the one before where the host launches it.
    """
    times, host = count(first, step), count(1000.0, from_host)

    def time(work: Callable[[], object]) -> Times:
        work()
        return Times(next(times), next(host))

    return time


def tuned_call(call: LayerCall, timer: timing.Timer) -> tuple[Record, list[search.LeftOut]]:
    found, left_out = search.tune_call(call, device(), timer, lambda what: None)
    assert found is not None
    return found, left_out
