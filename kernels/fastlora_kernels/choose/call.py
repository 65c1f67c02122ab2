"""A layer call of LoRA's, as predictions are asked for it."""

from dataclasses import dataclass

import torch

from fastlora_kernels.choose import plan as plans
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.predict.occupancy import programs_at_once
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import MASK_WORD_BITS, Plan, Shape, cdiv


@dataclass(frozen=True)
class Call:
    """One layer call to predict: forward and backward with every gradient but the frozen weight's.

    Attributes:
        shape: Sizes of the call.
        dtype: The dtype of x.
        target: The GPU.
        dropping: Whether dropout is active.
        dora: Whether every output is multiplied by a factor.
    """

    shape: Shape
    dtype: torch.dtype
    target: Target
    dropping: bool
    dora: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x."""
        return self.dtype.itemsize

    @property
    def x_bytes(self) -> int:
        """Bytes of x, and of its gradient."""
        return self.shape.m * self.shape.k * self.itemsize

    @property
    def y_bytes(self) -> int:
        """Bytes of y, and of its gradient."""
        return self.shape.m * self.shape.n * self.itemsize

    @property
    def s_bytes(self) -> int:
        """Bytes of S, and of its gradient."""
        return self.shape.m * self.shape.r * self.itemsize

    @property
    def mask_bytes(self) -> int:
        """Bytes of the packed mask."""
        return self.shape.m * cdiv(self.shape.k, MASK_WORD_BITS) * 4 if self.dropping else 0

    def elements(self, each: float) -> float:
        """An amount for every element of x that dropout touches."""
        return self.shape.m * self.shape.k * each if self.dropping else 0.0

    def plan(self, kernel: Kernel) -> Plan:
        """The plan of one of its kernels."""
        return plans.choose(kernel, self.shape, self.dtype, self.target)

    def at_once(self, kernel: Kernel, plan: Plan) -> int:
        """Programs of a kernel that one multiprocessor holds."""
        return programs_at_once(kernel.name, plan.tile, self.dtype, self.target, dropping=self.dropping)
