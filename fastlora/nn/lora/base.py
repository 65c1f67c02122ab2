"""What every LoRA layer is: an update beside a frozen weight, which plain state dicts fit."""

from typing import Any

from fastlora.nn.lora.plain import after_load, before_load, write_plain
from fastlora.nn.lora.update import LoRAUpdate


class LoRAModule(LoRAUpdate):
    """Mixin for a layer with a frozen weight W and a trainable update (alpha/rank)·B·A.

    The shapes below are those beside a W ``[out, in]``; convolutions and embeddings say their own.

    LoRA: Hu et al., https://arxiv.org/abs/2106.09685; rank-stabilised scaling: Kalajdzievski,
    https://arxiv.org/abs/2312.03732; DoRA: Liu et al., https://arxiv.org/abs/2402.09353.

    Attributes:
        lora_A: ``[rank, in]``, trainable.
        lora_B: ``[out, rank]``, trainable, zero at the start.
        rank: Inner size of the update.
        alpha: Numerator of :attr:`scaling`.
        lora_dropout: Probability of zeroing an element of the update's input while training.
        rslora: Whether :attr:`scaling` is alpha/√rank instead of alpha/rank.
        dora: Whether the updated weight keeps a trained norm for every output feature.
        lora_magnitude_vector: These norms ``[out]``, trainable; with ``dora`` alone.
    """

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The usual state dict; while merged, the plain layer's, with the update in its weight."""
        state = super().state_dict(*args, **kwargs)
        write_plain(self, state, kwargs.get("prefix", args[1] if len(args) > 1 else ""))
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        metadata, _, missing, _, errors = args
        before_load(self, state_dict, prefix, metadata, errors)
        super()._load_from_state_dict(state_dict, prefix, *args)
        after_load(self, state_dict, prefix, missing)
