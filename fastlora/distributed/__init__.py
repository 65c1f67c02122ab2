"""What the distribution engines need to know of our layers."""

from fastlora.distributed.tensor_parallel import LoRAColwiseParallel, LoRARowwiseParallel

__all__ = ["LoRAColwiseParallel", "LoRARowwiseParallel"]
