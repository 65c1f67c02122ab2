"""Models by name, built without memory for their weights, or with random ones."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora._core.backend import KERNEL_DTYPES
from fastlora._core.extras import require
from fastlora.transfer.models.backbones import vit_s14
from fastlora.transfer.models.efficientnet import ARCHITECTURE
from fastlora.transfer.models.find import find_model
from fastlora.transfer.models.freezing import keep_frozen_in_eval
from fastlora.transfer.models.names import DINOV2, EFFICIENTNET_LITE0, TIMM_PREFIX, check_name

LLAMA_7B = "llama-7b"
# the published 7-billion-parameter LLaMA (Touvron et al., https://arxiv.org/abs/2302.13971)
_LLAMA_7B_CONFIG = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "use_cache": False,
}
_DEFAULT_CLASSES = 1000
_IMAGE_SIZE = 224


@dataclass(frozen=True)
class ModelSpec:
    """A model by its name, and the batch it is looked at with.

    Attributes:
        name: A model that :func:`fastlora.create_transfer_model` knows, or ``llama-7b``.
        num_classes: Outputs of an image model; None means 1000.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; None means bfloat16 for ``llama-7b``, else
            float32.
        batch_size: Number of images or texts in a batch.
        sequence_length: Number of tokens in a text.

    Raises:
        ValueError: An unknown name (near ones are listed) or dtype, or a size below 1.
        ImportError: The library that has the model is not installed.

    Example:
        >>> ModelSpec("resnet18").torch_dtype
        torch.float32
    """

    name: str
    num_classes: int | None = None
    dtype: str | None = None
    batch_size: int = 8
    sequence_length: int = 512

    def __post_init__(self) -> None:
        """Check every value."""
        for size in ("num_classes", "batch_size", "sequence_length"):
            value = getattr(self, size)
            if value is not None and value < 1:
                raise ValueError(f"expected {size} >= 1, got {value}; 8 is usual for a batch")
        if self.dtype is not None and self.dtype not in KERNEL_DTYPES:
            raise ValueError(f"expected dtype to be one of {', '.join(KERNEL_DTYPES)}, got {self.dtype!r}")
        if self.is_text and self.num_classes is not None:
            raise ValueError(
                f"expected no num_classes for {LLAMA_7B}, got {self.num_classes}; it predicts words"
            )
        check_name(self.name, LLAMA_7B)

    @property
    def is_text(self) -> bool:
        """Whether it reads tokens; such a model keeps its head when it is adapted."""
        return self.name == LLAMA_7B

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return KERNEL_DTYPES[self.dtype or ("bfloat16" if self.is_text else "float32")]


def build(spec: ModelSpec, *, weightless: bool = True) -> nn.Module:
    """The model in train mode on the CPU, everything trainable.

    It is what :func:`fastlora.create_transfer_model` makes, with other weights: what is frozen in an image
    model stays in eval mode.

    Args:
        spec: The model's name, number of classes and dtype.
        weightless: Give every parameter its shape without its memory: all elements are one zero. Counting and
            a pass on shapes work, and layers can be added as to any model. Without it, random weights.

    Example:
        >>> model = build(ModelSpec("resnet18"))
        >>> model.fc.weight.shape, model.fc.weight.untyped_storage().nbytes()
        (torch.Size([1000, 512]), 4)
    """
    make = _maker(spec)
    with warnings.catch_warnings():
        # about initial values, which don't matter here
        warnings.simplefilter("ignore", FutureWarning)
        model = _on_meta(make) if weightless else make()
    model = model.to(spec.torch_dtype)
    return (_without_memory(model) if weightless else model).train()


def sample_input(spec: ModelSpec, model: nn.Module) -> dict[str, Tensor] | Tensor:
    """A batch for a model, of random values: pixels or tokens.

    Args:
        spec: The model's name, and the size of the batch.
        model: The model itself, which may say how large its pictures are.
    """
    if spec.is_text:
        shape = (spec.batch_size, spec.sequence_length)
        return {"input_ids": torch.randint(_LLAMA_7B_CONFIG["vocab_size"], shape)}
    return torch.randn(spec.batch_size, *_image_shape(spec, model), dtype=spec.torch_dtype)


def describe_input(spec: ModelSpec, model: nn.Module) -> str:
    """What :func:`sample_input` makes, in words.

    Args:
        spec: The model's name, and the size of the batch.
        model: The model itself, which may say how large its pictures are.
    """
    if spec.is_text:
        return f"{spec.batch_size} x {spec.sequence_length} tokens"
    return f"{spec.batch_size} images of {' x '.join(map(str, _image_shape(spec, model)))}"


def _maker(spec: ModelSpec) -> Callable[[], nn.Module]:
    if spec.is_text:
        transformers = require(
            "transformers", distribution="transformers", purpose=f"the model {LLAMA_7B}", extra="peft"
        )
        config = transformers.LlamaConfig(**_LLAMA_7B_CONFIG)
        return lambda: _module(transformers.LlamaForCausalLM(config))
    classes = spec.num_classes or _DEFAULT_CLASSES
    if spec.name == DINOV2:
        return lambda: keep_frozen_in_eval(vit_s14(_IMAGE_SIZE, classes))
    # those that come in packages have no random weights of their own
    name = f"{TIMM_PREFIX}{ARCHITECTURE}" if spec.name == EFFICIENTNET_LITE0 else spec.name
    find = find_model(name, weights=None)
    return lambda: find(classes)[0]


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):
        # some constructors compute with tensors: these models get values first and lose them afterwards
        return make()


def _without_memory(model: nn.Module) -> nn.Module:
    """Replace every parameter by one zero that is expanded to its shape.

    The meta device would do for counting, but layers are only added to weights with values.
    """
    originals = list(model.parameters())
    replaced = {id(p): nn.Parameter(_zero(p).expand(p.shape), p.requires_grad) for p in originals}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = replaced[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model


def _zero(parameter: Tensor) -> Tensor:
    return torch.zeros((), dtype=parameter.dtype)


def _image_shape(spec: ModelSpec, model: nn.Module) -> tuple[int, ...]:
    described: Any = getattr(model, "default_cfg", None)
    if described:
        # timm's way to say it
        return tuple(described["input_size"])
    size = getattr(model, "image_size", 299 if spec.name == "inception_v3" else _IMAGE_SIZE)
    return (3, size, size)
