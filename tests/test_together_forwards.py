"""Which layers are siblings: those that a forward calls with one variable, whatever its form."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sibling_models import (
    Attention,
    apart,
    assert_as_apart,
    attention,
    groups,
    run,
)

pytestmark = pytest.mark.usefixtures("way")


class OfTwo(Attention):
    """Keys and values of another x."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        q = self.q(x)
        x = x.tanh()
        mixed: Tensor = self.o(q * self.k(x) + self.v(x))
        return mixed


class WithABlock(Attention):
    """A block with layers stands between the calls."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        q = self.q(x)
        mixed: Tensor = self.o(x * q) + self.k(x) * self.v(x)
        return mixed


class OfALoop(Attention):
    """The variable is another one in the loop, and another one in its condition."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        y, others = self.q(x), (x.tanh(), x.exp())
        for x in others:
            y = y + self.k(x)
            if (x := x + 1) is not y:
                y = y * self.v(x)
        mixed: Tensor = self.o(y)
        return mixed


class OfOthers(Attention):
    """No two calls have one variable."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """``[..., 64]`` to the same."""
        for weight in (self.q(x), self.k(x * scale)):
            x = x + weight
        mixed: Tensor = self.o(x) + self.v(*[x])
        return mixed


class AfterItsArguments(Attention):
    """The output's call begins before those of its arguments."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        q = self.q(x)
        mixed: Tensor = self.o(q * self.k(x) + self.v(x))
        return mixed


class OfBranches(Attention):
    """Never more than one is called, by a condition."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        if self.training:
            mixed: Tensor = self.q(x)
        else:
            mixed = self.k(x)
        return mixed


class OfAnEarlyReturn(Attention):
    """Never more than one is called, because the first call is returned."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        if self.training:
            return torch.Tensor.tanh(self.q(x))
        mixed: Tensor = self.k(x)
        return mixed


class OfAnExpression(Attention):
    """Never more than one is called, by an expression's condition."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        mixed: Tensor = self.q(x) if self.training else self.k(x)
        return mixed


class OfCases(Attention):
    """Never more than one is called, by a pattern."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        match self.training:
            case True:
                mixed: Tensor = self.q(x)
            case _:
                mixed = self.k(x)
        return mixed


class OfHandlers(Attention):
    """The second is called where the first one failed."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        try:
            mixed: Tensor = self.q(x)
        except ValueError:
            mixed = self.k(x)
        return mixed


class AfterABranch(Attention):
    """A branch without calls excludes none."""

    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        """``[..., 64]`` to the same."""
        q = self.q(x)
        q = q * factor if self.training else q
        mixed: Tensor = self.o(q * self.k(x) + self.v(x))
        return mixed


KINDS: list[tuple[type[Attention], list[int]]] = [
    (OfTwo, [2]), (WithABlock, [2]), (OfALoop, []), (OfOthers, []), (AfterItsArguments, [3]),
    (OfBranches, []), (OfAnEarlyReturn, []), (OfAnExpression, []), (OfCases, []),
    (OfHandlers, []), (AfterABranch, [3]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "together"), KINDS)
def test_siblings_are_what_is_called_with_one_variable(kind: type[Attention], together: list[int]) -> None:
    module = attention(kind())
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert seen == together


def test_a_forward_without_a_source_has_no_siblings() -> None:
    kind: Any = type("Unknown", (Attention,), {})
    found: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.o(self.q(x) * self.k(x) + self.v(x))", found)
    kind.forward = found["forward"]
    module = attention(kind())
    with groups() as seen:
        run(module)
    assert not seen
