"""Put learned prompts into a vision transformer or a text model, and take them out again."""

from collections.abc import Collection

from fastlora.anatomy.all_linear import tell_frozen_head
from fastlora.anatomy.names import named_modules, unwrap
from fastlora.anatomy.targets import left_out_names
from fastlora.inject.lora import Model
from fastlora.inject.prompt_places import put_prompts
from fastlora.inject.trained import forget_tuners, train_only_tuners
from fastlora.nn.prompts.hosts import find_host
from fastlora.nn.prompts.modules import PROMPTS, PromptModule
from fastlora.nn.prompts.settings import PromptInit, PromptSettings


def apply_prompts(
    model: Model,
    *,
    num_tokens: int = 10,
    deep: bool = False,
    dropout: float = 0.0,
    init: PromptInit = "auto",
    modules_to_save: Collection[str] | None = None,
) -> Model:
    """Let a frozen transformer read learned tokens beside its input, and train nothing but these.

    A vision transformer gets visual prompts (Jia et al., https://arxiv.org/abs/2203.12119) between its class
    or register tokens and its patches; a text model of Hugging Face soft prompts (Lester et al.,
    https://arxiv.org/abs/2104.08691) in its embedded input: in an encoder after the first token, in a decoder
    before the text. The model keeps its signature and its output shapes, hidden states included; only
    attention maps show the prompts. Changes the model in place; what LoRA layers and adapters it has train
    on. What changed is logged at INFO on the logger ``fastlora`` and told by
    :func:`fastlora.adapter_summary`. Compile the model afterwards.

    Args:
        model: A ``VisionTransformer`` of torchvision or timm; a Hugging Face ViT, DeiT or DINOv2, a text
            encoder with absolute positions (BERT, RoBERTa) or a decoder with rotary ones (Llama); or a model
            around one of these.
        num_tokens: Number of prompts, in every block if ``deep``.
        deep: Whether every block has prompts of its own; vision only. Shallow prompts enter the first block,
            and timm's ``forward_intermediates`` refuses them.
        dropout: Probability in [0, 1] of zeroing an element of the prompts while training.
        init: ``"auto"``: visual prompts as ``"uniform"``, soft ones as ``"vocabulary"``. ``"uniform"``: from
            ±√(6 / (3 · patch area + hidden)) for vision, over the vocabulary's own spread for text.
            ``"vocabulary"``: different embeddings drawn from all of the vocabulary.
        modules_to_save: Names of modules to train whole, a new classification head, say.

    Returns:
        The same model, with the prompts as ``prompts`` in the transformer itself.

    Raises:
        TypeError: A model that takes no prompts, or a wrong argument type.
        ValueError: A setting out of range, a name that matches nothing, a model with prompts already, or one
            with several transformers. The model is unchanged after any error.

    Example:
        >>> from torchvision.models import VisionTransformer
        >>> model = VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3)
        >>> model = apply_prompts(model, num_tokens=5, deep=True, modules_to_save=["head"])
        >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
        [('heads.head.weight', (3, 8)), ('heads.head.bias', (3,)), ('prompts.tokens', (2, 5, 8))]
    """
    settings = PromptSettings(num_tokens, deep, dropout, init)
    root = unwrap(model)
    modules = named_modules(root)
    prompted = [name for name, module in modules.items() if isinstance(module, PromptModule)]
    if prompted:
        raise ValueError(
            f"expected a model without prompts, got one with {prompted[0]!r}; take them out with "
            "fastlora.remove_prompts first"
        )
    host = find_host(modules)
    host.check(settings)
    _, whole = left_out_names(root, None, modules_to_save)
    put_prompts(host, settings, host.draw(settings))
    train_only_tuners(root, whole)
    tell_frozen_head(root)
    return model


def remove_prompts(model: Model) -> Model:
    """Take the prompts out: every module is the one it was before, without a hook of ours.

    Args:
        model: A model with prompts, changed in place. Its parameters stay frozen or trainable as they are.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no prompts.

    Example:
        >>> from torchvision.models import VisionTransformer
        >>> model = apply_prompts(VisionTransformer(8, 4, 2, 2, 8, 16))
        >>> any("prompts" in name for name in remove_prompts(model).state_dict())
        False
    """
    root = unwrap(model)
    parents = [m for m in root.modules() if isinstance(m._modules.get(PROMPTS), PromptModule)]
    if not parents:
        raise ValueError(
            f"expected a model with prompts, got {type(root).__name__} without any; "
            "add them with fastlora.apply_prompts"
        )
    for parent in parents:
        prompts = parent._modules.pop(PROMPTS)
        assert isinstance(prompts, PromptModule)
        prompts.uninstall(parent)
    forget_tuners(root)
    return model
