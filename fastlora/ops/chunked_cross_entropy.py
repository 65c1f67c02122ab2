"""The loss of a language model, some rows at a time: the logits of all rows are never there at once.

Forward takes each chunk's gradient while its logits are there, so that the head's product runs once in each
direction; computing the chunks again in backward would run it twice forward. What is kept for backward is the
gradient of the hidden states, and of those of the head's parameters that train.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn import functional as F

from fastlora._core import backend
from fastlora._core.checks import check_labels
from fastlora.ops.runtime import autocast_dtype, refuse_second_derivative, rows_of, without_autocast

# at most this part of all rows at a time, and no more rows than make a product efficient
_PARTS, _MOST_ROWS = 8, 1024


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor] = (),
    *,
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Cross entropy of head(hidden), of whose logits an eighth at most is there at any time.

    Equal to ``F.cross_entropy(head(hidden).float(), labels)`` up to the order of sums, gradients too. Rows
    whose label is ignored are not computed. In graphs of ``torch.compile``, and on the backend
    ``reference``, all rows are computed at once.

    Args:
        hidden: ``[..., hidden_size]``, what the head is applied to.
        labels: ``[...]`` in int64, the class of each row, or ``ignore_index``.
        head: Maps rows ``[n, hidden_size]`` to logits ``[n, classes]``, each row by itself: a linear layer,
            one with LoRA, quantised or followed by elementwise functions. Called once a chunk.
        parameters: The tensors that the head uses and that want gradients.
        ignore_index: Label of rows that don't count.
        num_items: What the sum over rows is divided by, a number or a tensor of one element; by default the
            number of rows that count, which makes a mean.

    Returns:
        A scalar, in float32 for 16-bit logits, else in their dtype.

    Raises:
        TypeError: ``hidden`` is no floating-point tensor, or ``labels`` no int64 tensor.
        ValueError: Shapes or devices do not fit, the head uses a tensor that wants a gradient and is not
            among ``parameters``, or one of these has a hook, which would see the gradient of each chunk.

    Example:
        >>> import torch
        >>> from fastlora.functional import chunked_cross_entropy, lora_linear
        >>> A, B = torch.ones(1, 4, requires_grad=True), torch.zeros(9, 1, requires_grad=True)
        >>> head = lambda rows: lora_linear(rows, torch.zeros(9, 4), None, A, B, scaling=1.0)
        >>> loss = chunked_cross_entropy(torch.ones(2, 3, 4), torch.zeros(2, 3).long(), head, [A, B])
        >>> loss.backward()
        >>> round(float(loss.exp()), 4), B.grad is not None
        (9.0, True)
    """
    check_labels(hidden, labels)
    hidden, labels = rows_of(hidden), labels.flatten()
    if torch.compiler.is_compiling() or backend.selected() == "reference":
        return _at_once(hidden, labels, head, ignore_index, num_items)
    _refuse_hooks(parameters)
    counted = labels.ne(ignore_index).nonzero().squeeze(1)
    items = torch.as_tensor(counted.numel() if num_items is None else num_items, device=hidden.device)
    # of hidden's graph without its rows, for whoever differentiates the gradients
    origin = hidden[:0].clone()
    loss: Tensor = ChunkedCrossEntropyFunction.apply(
        hidden, origin, labels, counted, items, head, torch.is_grad_enabled(), *parameters
    )
    return loss


def _at_once(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    ignore_index: int,
    num_items: int | Tensor | None,
) -> Tensor:
    """The formula."""
    logits = head(hidden)
    logits = logits.to(_at_least_float32(logits.dtype))
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
    return loss if num_items is None else loss / num_items


class ChunkedCrossEntropyFunction(torch.autograd.Function):
    """Autograd of :func:`chunked_cross_entropy`. Saves the gradients of its own loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, origin: Tensor, labels: Tensor, *call: Any) -> Tensor:
        """The loss; takes the gradients that are wanted."""
        counted, items, head, recorded, *parameters = call
        need_hidden, ctx.needed = ctx.needs_input_grad[0], ctx.needs_input_grad[7:]
        wanted = [p for p, need in zip(parameters, ctx.needed, strict=True) if need]
        # where no row counts the loss is 0 / 0, and the gradients are zeros all the same
        share = (items if counted.numel() else torch.ones_like(items)).to(_at_least_float32(hidden.dtype))
        share = share.reciprocal()
        # divided last, half precision loses no gradient, and others save a pass; bfloat16 would round twice
        dtypes = (hidden.dtype, autocast_dtype(hidden))
        early = share if torch.bfloat16 in dtypes else None
        rows = _Rows(hidden, labels, head, wanted, need_hidden, early)
        if recorded and (need_hidden or wanted):
            total, gradients = _sum_and_gradients(rows, counted)
            if torch.float16 in dtypes and not _are_finite(gradients):
                # it holds no sum over that many rows, but their mean
                early = share.clamp(min=1 / _rows_at_most(hidden))
                total, gradients = _sum_and_gradients(rows._replace(factor=early), counted)
        else:
            total, gradients = _sum(rows, counted), []
        loss: Tensor = total / items
        late = share if early is None else share / early
        ctx.save_for_backward(origin, late, *wanted, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden and the parameters, those that are wanted."""
        (grad,) = grads
        origin, late, *kept = ctx.saved_tensors
        factor, wanted = grad * late, sum(ctx.needed)
        dtypes = [t.dtype for t in (origin, *kept[:wanted])]
        pairs = zip(kept[wanted:], dtypes, strict=True)
        found = iter([g if g is None else (_wide(g) * factor).to(dtype) for g, dtype in pairs])
        every = (next(found), *(None,) * 6, *(next(found) if need else None for need in ctx.needed))
        return refuse_second_derivative("chunked_cross_entropy", ctx, grads, every)


class _Rows(NamedTuple):
    """What a call computes from, some rows at a time.

    Attributes:
        hidden: ``[M, hidden_size]``.
        labels: ``[M]``.
        head: Makes logits of rows.
        parameters: The head's, whose gradients are wanted.
        need_hidden: Whether hidden's gradient is wanted.
        factor: What the logits' gradients are multiplied with, or None.
    """

    hidden: Tensor
    labels: Tensor
    head: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    need_hidden: bool
    factor: Tensor | None


def _sum(call: _Rows, counted: Tensor) -> Tensor:
    """The loss summed over the rows that count."""
    return torch.stack([_evaluated(call, rows) for rows in _chunks(counted, call)]).sum()


def _sum_and_gradients(call: _Rows, counted: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The loss summed over the rows that count, and the gradients of hidden and the parameters."""
    of_hidden = torch.zeros_like(call.hidden) if call.need_hidden else None
    sums: list[Tensor | None] = [None] * len(call.parameters)
    losses = []
    for rows in _chunks(counted, call):
        # what a chunk saves is no business of the caller's checkpoint, which computes all this again
        with saved_tensors_hooks(_as_is, _as_is):
            loss, (of_rows, *gradients) = _differentiated(call, rows)
        losses.append(loss)
        if of_hidden is not None and of_rows is not None:
            of_hidden.index_copy_(0, rows, of_rows)
        sums = [_added(*pair) for pair in zip(sums, gradients, strict=True)]
    pairs = zip(sums, call.parameters, strict=True)
    # float16 may not hold what is divided later
    kept = [s if s is None or p.dtype == torch.float16 else s.to(p.dtype) for s, p in pairs]
    return torch.stack(losses).sum(), [of_hidden, *kept]


def _are_finite(gradients: list[Tensor | None]) -> bool:
    finite = [g.isfinite().all() for g in gradients if g is not None]
    return bool(torch.stack(finite).all()) if finite else True


def _wide(gradient: Tensor) -> Tensor:
    """In float32 instead of 16 bits, which would round the factor, too, where it lies on a GPU."""
    return gradient.to(_at_least_float32(gradient.dtype))


def _chunks(counted: Tensor, call: _Rows) -> tuple[Tensor, ...]:
    """The rows that count, as many at a time as may be; no rows at all are one chunk."""
    chunks: tuple[Tensor, ...] = counted.split(_rows_at_most(call.hidden))
    return chunks


def _rows_at_most(hidden: Tensor) -> int:
    """Of a chunk."""
    return max(1, min(len(hidden) // _PARTS, _MOST_ROWS))


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The sum of a parameter's gradients, in float32: 16 bits would be rounded at every chunk."""
    if gradient is None or total is not None:
        return total if gradient is None or total is None else total.add_(gradient)
    # gradients of two parameters may be one tensor
    return gradient.to(_at_least_float32(gradient.dtype), copy=True)


def _evaluated(call: _Rows, rows: Tensor) -> Tensor:
    log_p = _log_softmax(call.head(call.hidden[rows]))
    return -log_p.gather(1, call.labels[rows, None]).sum()


def _differentiated(call: _Rows, rows: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The loss of some rows; gradients of these and the parameters: softmax − one-hot, through the head."""
    with torch.enable_grad():
        some = call.hidden[rows].detach().requires_grad_(call.need_hidden)
        logits = call.head(some)
    _refuse_others(logits, [some, *call.parameters])
    target = call.labels[rows, None]
    log_p = _log_softmax(logits.detach())
    of_target = log_p.gather(1, target)
    loss = -of_target.sum()
    # in log_p's own memory
    gradient = log_p.exp_().scatter_(1, target, of_target.expm1_())
    if call.factor is not None:
        gradient.mul_(call.factor)
    sources = [some, *call.parameters] if call.need_hidden else call.parameters
    with without_autocast(some):
        found = torch.autograd.grad(logits, sources, gradient.to(logits.dtype), allow_unused=True)
    return loss, found if call.need_hidden else (None, *found)


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _log_softmax(logits: Tensor) -> Tensor:
    """Of rows, in float32 at least."""
    return torch.log_softmax(logits, dim=-1, dtype=_at_least_float32(logits.dtype))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _refuse_hooks(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters with hooks on their gradient: they would run for each chunk and again for the sum."""
    for parameter in parameters:
        if parameter._backward_hooks:
            raise ValueError(
                "expected parameters without hooks, got one of shape "
                f"{tuple(parameter.shape)} with a hook on its gradient; take "
                "Tensor.register_post_accumulate_grad_hook, or fastlora.use_backend('reference')"
            )


def _refuse_others(logits: Tensor, known: list[Tensor]) -> None:
    """Refuse a head whose output takes a gradient to a tensor that nobody named: it would be lost."""
    ends = {get_gradient_edge(tensor).node for tensor in known if tensor.requires_grad}
    seen, found = set(ends), [logits.grad_fn]
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not node.next_functions:
            shape = tuple(getattr(node, "variable", logits).shape)
            raise ValueError(
                f"expected parameters to name every tensor of the head that wants a gradient, got "
                f"{len(known) - 1} without one of shape {shape}; add it, or detach it"
            )
        found.extend(next_node for next_node, _ in node.next_functions)
