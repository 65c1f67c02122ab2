"""Tensor parallelism of LoRA layers: styles for ``torch.distributed.tensor.parallel.parallelize_module``."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from fastlora.nn import LoRALinear
from fastlora.nn.lora.start import has_start


class _ParallelLinear(LoRALinear):
    def check_mergeable(self, *, requantise: bool = False) -> None:
        """Refuse to merge.

        Args:
            requantise: Has no effect.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "expected whole weights to merge, got a tensor-parallel layer; merge before "
            "parallelize_module, or save the adapter and merge it into a model of one process"
        )


class ColwiseLoRALinear(_ParallelLinear):
    """What :class:`LoRAColwiseParallel` makes of a LoRALinear: whole rows of W and B here."""

    def _lora_linear(self, x: Any, weight: Any, bias: Any | None, lora_A: Any, lora_B: Any) -> Tensor:
        # dX and dA are sums over the processes
        y = super()._lora_linear(
            x.to_local(grad_placements=[Partial()]),
            weight.to_local(),
            None if bias is None else bias.to_local(),
            lora_A.to_local(grad_placements=[Partial()]),
            lora_B.to_local(),
        )
        return DTensor.from_local(y, weight.device_mesh, [Shard(-1)], run_check=False)


class RowwiseLoRALinear(_ParallelLinear):
    """What :class:`LoRARowwiseParallel` makes of a LoRALinear: whole columns of W and A here."""

    def _lora_linear(self, x: Any, weight: Any, bias: Any | None, lora_A: Any, lora_B: Any) -> Tensor:
        # y and dB are sums over the processes
        mesh = weight.device_mesh
        if bias is not None:
            bias = bias.to_local(grad_placements=[Partial()])
            # it must not be summed over the processes, and a trained one needs a gradient in all of them
            bias = bias if mesh.get_local_rank() == 0 else bias * 0
        y = super()._lora_linear(
            x.to_local(),
            weight.to_local(),
            bias,
            lora_A.to_local(),
            lora_B.to_local(grad_placements=[Partial()]),
        )
        return DTensor.from_local(y, mesh, [Partial()], run_check=False)


class LoRAColwiseParallel(ColwiseParallel):
    """``ColwiseParallel`` for a :class:`fastlora.LoRALinear`: every process computes some output features.

    Weight, bias and B are cut along the output features, A is whole everywhere. Layouts are given and
    default as in ``ColwiseParallel``: a replicated input, an output that is sharded along its last dimension.
    With the same seed everywhere dropout is that of one process.

    Raises:
        TypeError: The module is no LoRALinear, but a subclass, one parallel already, or another kind.
        ValueError: It is merged, has DoRA, or a start to subtract (``fastlora.init``).

    Example:
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> styles = {"mlp.fc1": LoRAColwiseParallel(), "mlp.fc2": LoRARowwiseParallel()}
        >>> # parallelize_module(model, mesh, styles), after fastlora.apply_lora(model)
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _checked(module, type(self).__name__).__class__ = ColwiseLoRALinear
        return super()._apply(module, device_mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        placements = {"weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}
        _distribute(module, device_mesh, placements, self.src_data_rank)


class LoRARowwiseParallel(RowwiseParallel):
    """``RowwiseParallel`` for a :class:`fastlora.LoRALinear`: every process reads some input features.

    Weight and A are cut along the input features, B and bias are whole everywhere. Layouts are given and
    default as in ``RowwiseParallel``: an input that is sharded along its last dimension, a replicated output.
    The processes' parts of the input are dropped at the same places where their seeds are the same.

    Raises:
        TypeError: The module is no LoRALinear, but a subclass, one parallel already, or another kind.
        ValueError: It is merged, has DoRA, or a start to subtract (``fastlora.init``).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _checked(module, type(self).__name__).__class__ = RowwiseLoRALinear
        return super()._apply(module, device_mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        placements = {"weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate()}
        _distribute(module, device_mesh, placements, self.src_data_rank)


def _checked(module: nn.Module, style: str) -> LoRALinear:
    if type(module) is not LoRALinear:
        raise TypeError(
            f"expected a fastlora.LoRALinear, no subclass and not parallel already, for {style}, got "
            f"{type(module).__name__}; call fastlora.apply_lora first, and use torch's own styles for other "
            "modules"
        )
    problem = None
    if module.merged:
        problem = "an unmerged layer, got a merged one; call fastlora.unmerge_adapters first"
    elif module.dora:
        problem = "a layer without DoRA, got dora=True"
    elif has_start(module):
        problem = "a layer without a start to subtract, got one of fastlora.init"
    if problem is not None:
        raise ValueError(f"expected {problem}")
    return module


def _distribute(
    module: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement], src_data_rank: int | None
) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        cut = distribute_tensor(parameter, mesh, [placements[name]], src_data_rank=src_data_rank)
        module.register_parameter(name, nn.Parameter(cut, requires_grad=parameter.requires_grad))
