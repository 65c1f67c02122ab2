"""Frozen weights that PEFT puts into an adapter file: embeddings, which a resized vocabulary changes."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastlora.anatomy.names import clean_name, plain_tensor, tuner_parameters
from fastlora.state.keys import PREFIX

# names that PEFT's layers have for the module that they are around
_BASE, _ORIGINAL, _TRAINED = ".base_layer.", ".original_module.", ".modules_to_save."


class BaseCopies:
    """Tells which tensors of a file are frozen ones of a model, and whether the model can take them.

    Attributes:
        found: Tensors of the model and the values that they should get, where they differ.
        problems: Why others can't be taken.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], *, fresh: bool) -> None:
        """See the class.

        Args:
            model: A model whose tensors are compared, not changed.
            tensors: The file's, by key.
            fresh: Whether the model has no adapters yet, which its frozen weights may belong to.
        """
        # without what is added, and under the names that a model without adapters has
        added = {id(parameter) for parameter in tuner_parameters(model)}
        self._state: dict[str, Tensor] = {
            clean_name(key).replace(".original_layer.", "."): tensor
            for key, tensor in model.state_dict(keep_vars=True).items()
            if id(tensor) not in added and ".lora_" not in key
        }
        self._tensors, self._fresh = tensors, fresh
        self._wanted: dict[int, tuple[str, Tensor]] = {}
        self.found: list[tuple[Tensor, Tensor]] = []
        self.problems: list[str] = []

    def read(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that are understood, with a problem or without."""
        return {key for key in keys if self._repeats(key) or self._takes(key)}

    def _repeats(self, key: str) -> bool:
        """PEFT writes the trained weights of an embedding twice."""
        other = self._tensors.get(key.replace(_TRAINED, ".", 1)) if _TRAINED in key else None
        return other is not None and torch.equal(other, self._tensors[key])

    def _takes(self, key: str) -> bool:
        value = self._tensors[key]
        name = key.removeprefix(PREFIX)
        here = self._state.get(name, self._state.get(name.replace(_BASE, ".", 1).replace(_ORIGINAL, ".", 1)))
        if here is None or not key.startswith(PREFIX):
            return False
        if _ORIGINAL in key and not self._fresh:
            # of a module that trains whole, whose frozen weights an adapted model has no more
            return True
        if here.shape != value.shape:
            self.problems.append(
                f"{key}: expected {list(here.shape)} as in the model, got {list(value.shape)}; resize the "
                "model first (model.resize_token_embeddings)"
            )
        elif self._agrees(key, here, value) and not torch.equal(value.to(here.dtype), plain_tensor(here)):
            if self._fresh:
                self.found.append((here, value))
            else:
                self.problems.append(f"{key}: not what the model has; load it into a model without adapters")
        return True

    def _agrees(self, key: str, here: Tensor, value: Tensor) -> bool:
        """One tensor of the model may have several names, and then has to be the same under all of them."""
        first, other = self._wanted.setdefault(id(here), (key, value))
        if not torch.equal(value, other):
            self.problems.append(
                f"{key}: not equal to {first}, with which the model shares it; give the model "
                "tie_word_embeddings=False in its config"
            )
            return False
        return True
