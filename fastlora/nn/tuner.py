"""What every module that fastlora adds to a model has in common."""

from torch import nn


class TunerModule(nn.Module):
    """A module with trainable parameters of its own in a frozen model: a LoRA layer, an adapter, prompts."""

    def adapter_params(self) -> list[str]:
        """Names of this module's own trainable parameters, those of its children with dots."""
        raise NotImplementedError
