"""The numbers of a LoRA layer as a tensor, which may change without a compiled graph being compiled again."""

import torch


class Scalars:
    """Scaling and dropout of a layer.

    A compiled graph bakes numbers in that it reads; a tensor is an input, whatever it holds.

    Attributes:
        scaling: Factor of the low-rank path.
        dropout: Probability of zeroing an element of its input.
        drops: Whether there is dropout at all, which decides what a graph contains.
        drops_all: Whether it leaves nothing of the low-rank path.
        tensor: Both numbers, float64 ``[2]`` on the CPU, so that reading them never waits for a GPU.
    """

    def __init__(self, scaling: float, dropout: float) -> None:
        """See the attributes."""
        self.scaling, self.dropout, self.drops = scaling, dropout, dropout > 0
        self.drops_all = dropout == 1
        # a layer may be made under a device context, torch.device("meta") for one
        self.tensor = torch.tensor([scaling, dropout], dtype=torch.float64, device="cpu")
