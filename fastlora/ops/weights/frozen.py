"""What an op asks of a frozen weight that is stored quantised: its shape, and its rows, dense."""

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from fastlora._core import backend
from fastlora_kernels.quant.kernels import MOST_ELEMENTS, most_rows


class FrozenWeight:
    """A quantised weight ``[N, K]``, read where its library keeps it; nothing is copied or kept dense.

    Attributes:
        shape: N outputs, K inputs.
        device: Where it is stored.
        tensors: What is stored: packed values, statistics, scales. They share memory with the library's.
        form: What beside these tensors' layouts says how they are read: format, block size.
        row_step: Rows at whose multiples a part may begin, where blocks of values run over the ends of rows.
        compute_dtype: What its layer casts inputs to before the product; None: it takes them as they are.
    """

    shape: torch.Size
    device: torch.device
    tensors: tuple[Tensor, ...]
    form: Hashable
    row_step: int = 1
    compute_dtype: torch.dtype | None = None

    @property
    def storage(self) -> str:
        """How it is stored, for what was measured: ``nf4``, ``int8``, ``fp8``, or ``fp8-rows`` where no row
        has more than one scale; ``other`` for the rest.
        """
        return "other"

    @property
    def is_decodable(self) -> bool:
        """Whether the forward pass's kernel can decode it in its loop."""
        return False

    @property
    def scale(self) -> Tensor | None:
        """Factors of the rows ``[N]`` or of all ``[1]``, float32, where W is these times what is stored."""
        return None

    def dense(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Rows of W ``[rows, K]`` in a new tensor: the same bits as its library's own in this dtype.

        Args:
            dtype: float64, float32, float16 or bfloat16.
            rows: Begins at a multiple of :attr:`row_step`; all of them without it.
        """
        raise NotImplementedError

    def recipe(self) -> tuple[list[int], float]:
        """What the weight is made of beside :attr:`tensors`: whole numbers, N and K first, and another."""
        raise NotImplementedError

    @classmethod
    def rebuilt(cls, tensors: Sequence[Tensor], numbers: Sequence[int], unit: float) -> "FrozenWeight":
        """The weight of these tensors and a :meth:`recipe`.

        Args:
            tensors: What is stored.
            numbers: The recipe's whole numbers.
            unit: The recipe's other number.
        """
        raise NotImplementedError

    def _span(self, rows: slice) -> tuple[int, int]:
        """First row and the one behind the last."""
        start, stop, _ = rows.indices(self.shape[0])
        if start % self.row_step:
            raise ValueError(
                f"a part begins at a multiple of {self.row_step} rows, where a block does, not at row {start}"
            )
        return start, max(stop, start)

    def outline(self, dtype: torch.dtype) -> Tensor:
        """A tensor of this shape and device without values of its own, to check and decide by."""
        return torch.empty(1, self.shape[1], dtype=dtype, device=self.device).expand(self.shape)

    def parts(self, dtype: torch.dtype) -> Iterator[slice]:
        """Rows whose dense form fits the workspace, one part after the other."""
        rows, columns = self.shape
        step = most_rows(columns, dtype.itemsize, self.row_step)
        # a weight without rows is one part, too
        for start in range(0, max(rows, 1), step):
            yield slice(start, min(start + step, rows))


def is_made_dense_by_kernels(device: torch.device, dtype: torch.dtype, elements: int) -> bool:
    """Whether rows become dense by a kernel of ours: on a GPU, and where the backend was asked for.

    Args:
        device: Where the weight is stored.
        dtype: What the dense rows are to be in, for instance bfloat16.
        elements: How many they have.
    """
    if device.type != "cuda" and backend.selected() != "triton":
        return False
    # a compiled graph sees operators alone
    if torch.compiler.is_compiling() or dtype not in backend.KERNEL_DTYPES.values():
        return False
    if elements > MOST_ELEMENTS:
        return False
    return backend.resolve(device, dtype) == "triton"


class Unchanged:
    """A quantised weight that is kept for backward, and refused there if it was changed in place meanwhile.

    Not among autograd's saved tensors: whoever packs or moves those away would take the base model along.
    """

    def __init__(self, weight: FrozenWeight) -> None:
        """Keep it with what torch counts of changes."""
        self._weight, self._versions = weight, _versions(weight)

    def weight(self) -> FrozenWeight:
        """The weight.

        Raises:
            RuntimeError: It was changed in place.
        """
        if _versions(self._weight) != self._versions:
            raise RuntimeError(
                "a quantised weight was changed in place between a forward pass and its backward pass; run "
                "the forward pass again"
            )
        return self._weight


def _versions(weight: FrozenWeight) -> tuple[int, ...]:
    # a graph's own inputs
    if torch.compiler.is_compiling():
        return ()
    return tuple(t._version for t in weight.tensors if not t.is_inference())
