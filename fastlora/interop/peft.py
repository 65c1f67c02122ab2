"""PEFT models on the fused op, in place and reversibly."""

import sys
from collections import Counter
from typing import Any, Literal, TypeVar

from torch import nn

from fastlora._core.extras import require
from fastlora._core.log import logger
from fastlora._core.option_checks import check_flag
from fastlora.interop._chunked_loss import chunk, chunkable, unchunk
from fastlora.ops.weights.repacking import keep_as_stored, let_rewrite
from fastlora.together.model import follow_layers

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, loss: Literal["model", "chunked"] = "model", one_mask: bool = False) -> Model:
    """Let a PEFT model's LoRA linear layers run on the fused op, in place.

    Layers, parameters and their names stay PEFT's own, so saving, switching, merging, disabling and deleting
    adapters, ``modules_to_save``, optimisers and trainers see nothing new; adapters that are added later run
    fused too. Float32 adapters beside 16-bit weights are rounded to these for the products, as autocast does.
    Of dropout the masks are others than PEFT's for the same seed.

    Served are LoRA, rsLoRA, DoRA and ``lora_bias`` on ``nn.Linear``, and all but DoRA on quantised layers
    that :func:`fastlora.ops.weights.read.frozen_weight` names. Others (a convolution, other quantisers or
    variants, hooks or other classes inside) stay PEFT's and are told by one warning on the logger
    ``fastlora``. What changes afterwards counts from the next call on: a call of which the fused op would
    pass something over is PEFT's own. Calling this again counts the layers again.

    A gated MLP (of Llama, Mistral, Qwen, Gemma, Phi and whatever computes as they do) whose last layer runs
    fused keeps gate and up for backward, half of what it kept, and computes their product again. One without
    a gate (of BERT, ViT, CLIP, Phi, GPT-NeoX, timm and whatever computes as they do) keeps what its GELU or
    SiLU is applied to, a half to a fifth.

    Layers that their module's forward calls with one variable (query, key and value; gate and up) are all
    computed by the first one's call, on a GPU while one of them trains, elsewhere where a gradient of their
    input is wanted: that is kept once, and its gradient summed where it lies. Outputs are the same bits on a
    CPU; a later call takes its own only if nothing has changed since (what is written past autograd, by
    ``tensor.data``, is not seen), else its layer computes alone, as all do in compiled graphs. Where one has
    dropout, the first call draws all masks, with and without gradients. They have one backward pass:
    gradients of one output after the other need ``retain_graph=True``, and x, A or B that change in place
    between two calls make it fail.

    A quantised weight becomes dense for its product alone. A call is fused where the layer computes in x's
    dtype, or in autocast's: give 4-bit layers the ``bnb_4bit_compute_dtype`` that you train in. Layers that
    quantise x, too (LLM.int8, whatever its ``threshold``, FP8, torchao's with dynamic activations), are
    computed from the weight's own values and x as it is, as bitsandbytes trains on a CPU. Merging is PEFT's
    own: it quantises the merged weight anew, and warns. Where bitsandbytes rewrites 4-bit weights in an
    evaluation pass (CPUs with AVX512-BF16), after which they give no gradient, that is switched off.

    With ``loss="chunked"`` a causal language model of transformers that is called with labels while
    gradients are recorded takes its loss from an eighth of the logits at a time, and the gradients with it;
    equal up to the order of sums. Heads may be tied, quantised, with LoRA or trained whole; scaled and capped
    logits count, and so does ``num_items_in_batch``. ``outputs.logits`` of such a call has a shape and no
    numbers: reading it raises a RuntimeError. Under ``torch.no_grad()``, without labels, and in graphs of
    ``torch.compile``, all is the model's own. LoRA need not be PEFT's then, nor there at all.

    Args:
        model: With PEFT's LoRA layers anywhere inside.
        loss: "model", the model's own, or "chunked".
        one_mask: Let layers that share their input and have the same dropout drop the same elements of it,
            which PEFT's never do. One mask is kept for all of them; a CPU draws it once, and masks x once for
            those of one factor. Layers that compute alone, as in compiled graphs, have masks of their own,
            and so have all after another call without it.

    Returns:
        The same model.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: ``one_mask`` is neither True nor False.
        ValueError: There are no LoRA layers of PEFT in it, bitsandbytes has rewritten 4-bit weights in it
            for inference, or no model's loss in it can be chunked; nothing is changed then.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 2)), LoraConfig(target_modules=["0"]))
        >>> type(accelerate(model).base_model.model[0]).__name__
        'FusedLinear'
    """
    if loss not in ("model", "chunked"):
        raise ValueError(f'expected loss as "model" or "chunked", got {loss!r}')
    check_flag("one_mask", one_mask)
    chunked = chunkable(model) if loss == "chunked" else []
    layers = _peft_layers(model) if _peft_is_loaded() or not chunked else []
    if not layers and not chunked:
        raise ValueError(
            f"expected a model with LoRA layers of PEFT, got {type(model).__name__} without any; make one "
            "with peft.get_peft_model(model, LoraConfig(...)), or take fastlora.apply_lora"
        )
    keep_as_stored(model)
    if layers:
        _fuse(model, layers, one_mask=one_mask)
    unchunk(model)
    for causal in chunked:
        chunk(causal)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, in place; layers that were sharded or parametrized since stay so.

    Returns:
        The same model.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 2)), LoraConfig(target_modules=["0"]))
        >>> type(restore(accelerate(model)).base_model.model[0]).__name__
        'Linear'
    """
    unchunk(model)
    let_rewrite(model)
    if not _peft_is_loaded():
        return model
    for layer in _peft_layers(model):
        _layers().unfuse(layer)
    follow_layers(model)
    return model


def _fuse(model: nn.Module, layers: list[Any], *, one_mask: bool) -> None:
    linear = _layers()
    left: Counter[str] = Counter()
    for layer in layers:
        reason = linear.why_not(layer)
        if reason is not None:
            left[reason] += 1
            linear.unfuse(layer)
        else:
            linear.fuse(layer, one_mask=one_mask)
    follow_layers(model)
    if left:
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(left.items()))
        logger.warning("%d of %d LoRA layers run fused; left to PEFT: %s", _fused(layers), len(layers), told)


def _peft_is_loaded() -> bool:
    """Else nothing of its can be in a model."""
    return "peft" in sys.modules


def _layers() -> Any:
    require("peft", distribution="peft", purpose="accelerating a PEFT model", extra="peft")
    from fastlora.interop import _peft_linear

    return _peft_linear


def _peft_layers(model: nn.Module) -> list[Any]:
    kind = _layers().PeftLayer
    return [module for module in model.modules() if isinstance(module, kind)]


def _fused(layers: list[Any]) -> int:
    kind = _layers().Fused
    return sum(isinstance(layer, kind) for layer in layers)
