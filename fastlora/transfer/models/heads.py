"""A classifier with a hidden layer in place of a linear one."""

import torch
from torch import Tensor, nn

from fastlora.anatomy.stages import head as find_head


class BottleneckHead(nn.Module):
    """Features ``[B, F]`` through a hidden layer with ReLU to logits ``[B, classes]``.

    Args:
        in_features: F.
        hidden_features: Width of the hidden layer.
        num_classes: Number of logits.
    """

    def __init__(self, in_features: int, hidden_features: int, num_classes: int) -> None:
        """See the class."""
        super().__init__()
        self.hidden: nn.Module = nn.Linear(in_features, hidden_features)
        self.classifier: nn.Module = nn.Linear(hidden_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.classifier(torch.relu(self.hidden(features)))
        return logits


def deepen_head(model: nn.Module, hidden_features: int) -> str:
    """Put a :class:`BottleneckHead` in the place of a model's linear classifier.

    Args:
        model: A classifier, changed in place.
        hidden_features: Width of the hidden layer.

    Returns:
        The new head's name in the model.

    Raises:
        ValueError: The classifier is no ``nn.Linear``.
    """
    name, head = find_head(model)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"expected a model with a linear classifier for hidden={hidden_features}, got a "
            f"{type(head).__name__} at {name!r}; choose another model"
        )
    model.set_submodule(name, BottleneckHead(head.in_features, hidden_features, head.out_features))
    return name
