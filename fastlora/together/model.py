"""Which of a model's layers are computed together."""

from torch import nn

from fastlora.together import mlp, mlp_spread, siblings


def follow_layers(model: nn.Module) -> None:
    """Let MLPs and LoRA layers that share their input compute together, and no others.

    To be called whenever LoRA layers were put into a model, changed their class or were taken out.

    Args:
        model: Changed in place, without a trace where no LoRA layer is left.
    """
    for module in model.modules():
        mlp.unfuse(module)
        mlp.fuse(module)
    mlp_spread.give_all(model.modules())
    siblings.find(model)
