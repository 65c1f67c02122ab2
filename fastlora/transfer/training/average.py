"""An exponential moving average of what trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.transfer.training.whole import fill, whole


class WeightAverage:
    """Averages parameters and floating-point buffers (Polyak & Juditsky 1992).

    What never changes is not copied. The decay rises to its value, min(decay, (1 + n) / (10 + n)) after n
    updates, as in TensorFlow, so that the first weights are soon forgotten.

    Args:
        model: Holds them.
        names: Names of the parameters and buffers to average.
        decay: In [0, 1); None averages nothing.
    """

    def __init__(self, model: nn.Module, names: list[str], decay: float | None) -> None:
        """See the class."""
        state = {} if decay is None else model.state_dict(keep_vars=True)
        self._live = {
            name: state[name] for name in names if name in state and state[name].is_floating_point()
        }
        self.average = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step``, counted from 1."""
        if self._decay is None:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.average.values()), [t.detach() for t in self._live.values()], 1 - decay
        )

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averages inside a ``with`` block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, tensor in self._live.items():
            average: Tensor = self.average[name]
            kept = tensor.detach().clone()
            tensor.detach().copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Any] | None:
        """The averages, whole and on the CPU; None without any."""
        return None if self._decay is None else dict(whole(self.average))

    def set_state(self, state: dict[str, Tensor] | None) -> None:
        """Go back to a :meth:`state`."""
        for name, average in self.average.items():
            fill(average, (state or {})[name])
