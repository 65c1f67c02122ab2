"""A model and its optimiser on Accelerate's devices: wrapped, sharded, stepped, saved and restored."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from fastlora.anatomy.stages import Stage, stages
from fastlora.transfer.optim import parameter_groups
from fastlora.transfer.training.attention import speed_up_attention
from fastlora.transfer.training.checks import several_examples
from fastlora.transfer.training.schedule import make_schedule
from fastlora.transfer.training.settings import TrainSettings
from fastlora.transfer.training.whole import fill, load_optimizer, whole


class Engine:
    """What turns losses into steps.

    Args:
        model: To train; wrapped while the engine lives, see :meth:`release`.
        head: Classifier of the model.
        saved: Names of the parameters and buffers that can change.
        settings: Hyper-parameters.
        total_steps: Optimiser steps of the run.
        accelerator: An ``accelerate.Accelerator``.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        saved: Sequence[str],
        settings: TrainSettings,
        total_steps: int,
        accelerator: Any,
    ) -> None:
        """See the class."""
        self.model, self._accelerator, self._settings = model, accelerator, settings
        self._saved = tuple(saved)
        parts = [] if model is head else stages(model, head)
        model.to(accelerator.device)
        if (
            settings.sharding == "fsdp2"
            and accelerator.num_processes > 1
            and not isinstance(model, FSDPModule)
        ):
            _shard(model, parts, accelerator.device.type)
        self._wrapped = self._wrap()
        optimizer = _optimizer(model, head, settings)
        self.schedule = make_schedule(optimizer, settings, total_steps)
        self._optimizer = accelerator.prepare_optimizer(optimizer)
        self._plain_optimizer = optimizer

    @property
    def lr(self) -> float:
        """Of the head, at the next step."""
        return float(self._plain_optimizer.param_groups[-1]["lr"])

    def forward(self, inputs: Any) -> Any:
        """What the model returns in the settings' precision, for a loss that is differentiated."""
        with self._accelerator.autocast(), several_examples():
            return self._wrapped(inputs)

    def part(self, *, last: bool) -> AbstractContextManager[None]:
        """Around a part's forward and backward: processes talk after the last part only."""
        if last:
            return nullcontext()
        if isinstance(self.model, FSDPModule):
            # gradients of a part are added where they are sharded
            return nullcontext()
        return self._accelerator.no_sync(self._wrapped)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part's loss."""
        self._accelerator.backward(loss)

    def step(self) -> float | None:
        """Clip, update and move the schedule on.

        Returns:
            The gradients' norm before clipping, or None if it isn't clipped.
        """
        norm = None
        if self._settings.clip_norm:
            clipped = self._accelerator.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)
            norm = float(whole(clipped))
        if norm is None or self._accelerator.scaler is not None or math.isfinite(norm):
            self._optimizer.step()
        self.schedule.step()
        self._optimizer.zero_grad()
        return norm

    def rewrap(self) -> None:
        """See which parameters require gradients now."""
        self.release()
        self._wrapped = self._wrap()

    def release(self) -> None:
        """Give the model its own forward back."""
        for handle in self._hooks:
            handle.remove()
        self._accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
        self._accelerator._models.clear()

    def weights(self) -> dict[str, Tensor]:
        """Everything that can change, whole and on the CPU."""
        state = self.model.state_dict(keep_vars=True)
        return {name: whole(state[name]) for name in self._saved}

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Undo what changed since :meth:`weights`."""
        state = self.model.state_dict(keep_vars=True)
        for name in self._saved:
            fill(state[name], weights[name])

    def state(self) -> dict[str, Any]:
        """Weights, optimiser, schedule and loss scaler."""
        scaler = self._accelerator.scaler
        return {
            "weights": self.weights(),
            "optimizer": whole(self._plain_optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to a :meth:`state`."""
        self.set_weights(state["weights"])
        load_optimizer(self._plain_optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])

    def _wrap(self) -> Any:
        # anew where other parameters require gradients now
        self._hooks = speed_up_attention(self.model, self._accelerator)
        # a sharded model talks to the other processes itself
        alone = isinstance(self.model, FSDPModule)
        return self._accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=alone)


def logits_of(output: Any) -> Tensor:
    """The logits ``[B, classes]`` in what a classifier returns."""
    if isinstance(output, Tensor):
        return output
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def _optimizer(model: nn.Module, head: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    groups = parameter_groups(
        model,
        head,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
        head_factor=settings.head_factor,
        lora_plus_ratio=settings.lora_plus_ratio,
    )
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups)


def _shard(model: nn.Module, parts: Sequence[Stage], device: str) -> None:
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for part in parts:
        for module in part.modules:
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
