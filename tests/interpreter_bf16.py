"""A shim for tests: Triton's CPU interpreter multiplies bf16 operands as integers and truncates to bf16."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def teach_interpreter_bf16() -> None:
    """Widen bf16 operands of ``tl.dot`` to fp32, which holds their products, and round casts to bf16.

    The interpreter's own cast truncates; GPUs round to nearest even.
    """
    builder: Any = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl
    if getattr(dot, "knows_bf16", False):
        return

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_rounded_bits(source.data), tl.bfloat16)
        return cast(self, source, to)

    create_dot.knows_bf16 = True  # type: ignore[attr-defined]
    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << np.uint32(16)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _rounded_bits(values: Any) -> Any:
    # torch does the rounding: it knows NaN, and numpy has no bf16
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)
