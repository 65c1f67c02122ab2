"""What a frozen model takes less where the weights of its linear layers are stored quantised."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastlora_kernels.choose.quantised import Stored, stored_bytes


def saved_bytes(model: nn.Module, head: nn.Module, weight: Stored) -> int:
    """Bytes between the frozen weights of linear layers as they are and as they would be stored.

    As quantisers do it, embeddings, convolutions, attention in one module and the head stay as they are.

    Args:
        model: With what is added to it, if anything.
        head: The last part of it, which is not quantised.
        weight: How the weights would be stored.
    """
    kept = {id(module) for module in head.modules()}
    saved = 0
    for module in model.modules():
        if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
            continue
        if id(module) not in kept and not module.weight.requires_grad:
            dense = module.weight.numel() * module.weight.dtype.itemsize
            saved += dense - stored_bytes(weight, module.out_features, module.in_features)
    return saved
