"""Causal language models of transformers whose loss is computed some rows at a time.

Their forward stays their own: while it runs with labels and gradients are recorded, the head returns logits
that are computed when they are read, and transformers' loss of causal models takes them chunk by chunk.
"""

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fastlora._core.log import logger
from fastlora.functional import chunked_cross_entropy
from fastlora.interop._lazy_logits import LazyLogits, made_lazily, settled


class ChunkedLoss:
    """A causal language model with everything of it but how its loss is computed.

    The base of classes that :func:`chunk` makes, each with a model's own class, whose name and signature of
    forward they keep: configs, trainers and ``generate`` ask for these.
    """

    # for the type checker
    _plain: Any
    _labels_at: int
    _own_loss: Any
    forward: Any
    get_output_embeddings: Any

    @property
    def loss_function(self) -> Any:
        """The model's; it takes logits that are not computed yet, too."""
        own = self._own_loss
        chunked = own is _causal_loss() and not torch.compiler.is_compiling()
        return functools.partial(self._loss, own) if chunked else own

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._own_loss = value

    def _loss(
        self,
        own: Any,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``ForCausalLMLoss``."""
        # each token is to predict the next
        following = (
            F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
        )
        if (
            isinstance(logits, LazyLogits)
            and logits.can_be_taken
            and logits.shape[-1] == vocab_size
            and following.numel() == logits.shape[:-1].numel()
        ):
            hidden, compute = logits.by_rows()
            targets = following.to(hidden.device).reshape(hidden.shape[:-1])
            parameters = _trained(self.get_output_embeddings())
            options: dict[str, Any] = {"ignore_index": ignore_index, "num_items": num_items_in_batch}
            loss = chunked_cross_entropy(hidden, targets, compute, parameters, **options)
            # of float64, too, as transformers does
            return loss.float()
        options = {"ignore_index": ignore_index, "shift_labels": shift_labels}
        return own(logits, labels, vocab_size, num_items_in_batch, **options, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles by the model's own class, because this one stands in no module."""
        return _restored, (self._plain,), self.__dict__


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    # whoever kept this method before restore() calls it still
    if not isinstance(self, ChunkedLoss):
        return type(self).forward(self, *args, **kwargs)
    plain: Any = self._plain.forward
    at = self._labels_at
    labels = args[at] if len(args) > at else kwargs.get("labels")
    if torch.compiler.is_compiling() or labels is None or not torch.is_grad_enabled():
        return plain(self, *args, **kwargs)
    head = self.get_output_embeddings()
    reason = _why_at_once(self, head)
    if reason is not None:
        _tell_at_once(self._plain, reason)
        return plain(self, *args, **kwargs)
    with made_lazily(head) as calls:
        outputs = settled(plain(self, *args, **kwargs))
    if not any(call.taken for call in calls):
        _tell_at_once(self._plain, "something reads them before the loss, or moves them")
    return outputs


def why_not(model: Any) -> str | None:
    """Why a model's loss stays as it is; None if it can be taken in chunks, "" if it has none."""
    kind = type(model)
    if not hasattr(kind, "loss_function") or _labels_at(kind) is None:
        return ""
    if not isinstance(model.get_output_embeddings(), nn.Module):
        return ""
    if "forward" in vars(model):
        return f"{kind.__name__} has a forward of its own"
    if "loss_function" not in inspect.unwrap(kind.forward).__code__.co_names:
        return f"{kind.__name__} computes its loss itself"
    own = model.loss_function
    own = own.args[0] if isinstance(model, ChunkedLoss) and isinstance(own, functools.partial) else own
    if own is not _causal_loss():
        return f"the loss of {kind.__name__} is {getattr(own, '__name__', own)}"
    return None


def chunkable(model: nn.Module) -> list[nn.Module]:
    """The causal language models inside whose loss can be taken in chunks.

    Raises:
        ValueError: There are none.
    """
    reasons = {module: why_not(module) for module in model.modules()}
    found = [module for module, reason in reasons.items() if reason is None]
    if not found:
        told = "; ".join(sorted({reason for reason in reasons.values() if reason}))
        raise ValueError(
            'expected for loss="chunked" a causal language model of transformers that takes labels, got '
            f"{type(model).__name__}{f': {told}' if told else ''}; leave loss out for the model's own"
        )
    return found


def chunk(model: Any) -> None:
    """Change a causal language model's class, if it has not one yet."""
    made: Any = _chunked_class
    if not isinstance(model, ChunkedLoss):
        model.__class__ = made(type(model))


def unchunk(model: nn.Module) -> None:
    """Give the language models inside their own classes back, if they lost them."""
    module: Any
    for module in model.modules():
        # FSDP's class of one stays: it computes the same
        if ChunkedLoss in type(module).__bases__:
            module.__class__ = module._plain


@functools.cache
def _chunked_class(plain: Any) -> Any:
    own = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    own |= {
        "_plain": plain,
        "_labels_at": _labels_at(plain),
        # transformers' property, or whatever the class has in its place
        "_own_loss": inspect.getattr_static(plain, "loss_function"),
        "forward": functools.wraps(plain.forward)(forward),
    }
    return type(plain.__name__, (ChunkedLoss, plain), own)


def _restored(plain: Any) -> Any:
    kind = _chunked_class(plain)
    return kind.__new__(kind)


def _labels_at(kind: type[nn.Module]) -> int | None:
    """Where among forward's arguments labels are; None if it takes none."""
    _, *names = inspect.signature(kind.forward).parameters
    return names.index("labels") if "labels" in names else None


def _causal_loss() -> Any:
    """transformers' loss of causal models; None before transformers is there."""
    return vars(sys.modules.get("transformers.loss.loss_utils", torch)).get("ForCausalLMLoss")


def _why_at_once(model: Any, head: nn.Module) -> str | None:
    """Why not to take the loss by rows; None if calling the head means its forward and nothing else."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parts = list(head.modules())
    if any(isinstance(part, FullyShardedDataParallel | DTensor) for part in (*parts, *head.parameters())):
        return "its head is sharded"
    # those of parameters, too, are to see one gradient, which they may change
    found = (
        *(vars(part)[name] for part in parts for name in hooks),
        *(t._backward_hooks for t in _trained(head)),
    )
    if any(found):
        return "its head has hooks"
    if getattr(model, "_is_replica", False):
        return "DataParallel gathers them"
    if model._own_loss is not _causal_loss():
        return "somebody has given it another loss"
    return None


def _trained(head: nn.Module) -> list[Tensor]:
    """The head's tensors that want gradients; FSDP1 and DataParallel set some that are no Parameters."""
    found = [t for part in head.modules() for t in (*part._parameters.values(), *vars(part).values())]
    return list({id(t): t for t in found if isinstance(t, Tensor) and t.requires_grad}.values())


@functools.cache
def _tell_at_once(kind: type[nn.Module], reason: str) -> None:
    logger.warning("%s has its logits at once, and its loss from these: %s", kind.__name__, reason)
