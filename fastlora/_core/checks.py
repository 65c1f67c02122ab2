"""Argument checks of ops. Every message says what was expected, what was given and what to do."""

from typing import Any

import torch
from torch import Tensor

from fastlora.reference import ACTIVATIONS, GATES

FLOATING_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float,
) -> None:
    """Refuse arguments that :func:`fastlora.functional.lora_linear` can't serve.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes, dtypes, devices or scalars do not fit.
    """
    given = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    given |= {} if bias is None else {"bias": bias}
    for name, tensor in given.items():
        check_floating(name, tensor)
    _check_shapes(x, weight, bias, lora_A, lora_B)
    check_same_device(given)
    check_dropout(dropout)
    _check_number("scaling", scaling)
    # not math.isfinite: under torch.compile a scaling that changes is symbolic
    if not abs(scaling) < float("inf"):
        raise ValueError(f"expected a finite scaling, got {scaling!r}; it is usually alpha / rank")


def check_gated(gate: Tensor, up: Tensor | None, activation: str) -> None:
    """Refuse a gate that :func:`fastlora.functional.gated_lora_linear` can't serve.

    Raises:
        TypeError: No floating-point tensor.
        ValueError: Shapes, dtypes, devices or the activation do not fit.
    """
    if activation not in GATES:
        raise ValueError(f"expected an activation out of {', '.join(GATES)}, got {activation!r}")
    check_floating("gate", gate)
    if up is None:
        return
    check_floating("up", up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"expected gate and up of one shape and dtype, got {tuple(gate.shape)} in {gate.dtype} and "
            f"{tuple(up.shape)} in {up.dtype}"
        )
    check_same_device({"gate": gate, "up": up})


def check_labels(hidden: Tensor, labels: Tensor) -> None:
    """Refuse labels that :func:`fastlora.functional.chunked_cross_entropy` can't serve.

    Raises:
        TypeError: ``hidden`` is no floating-point tensor, or ``labels`` no int64 tensor.
        ValueError: Shapes or devices do not fit.
    """
    check_floating("hidden", hidden)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"expected labels as an int64 tensor, the class of each row, got {kind}")
    if labels.shape != hidden.shape[:-1] or hidden.dim() < 2:
        raise ValueError(
            f"expected a label for each row of hidden, {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}"
        )
    check_same_device({"hidden": hidden, "labels": labels})


def check_magnitude(magnitude: Tensor, weight: Tensor) -> None:
    """Refuse a magnitude that :func:`fastlora.functional.dora_linear` can't serve.

    Raises:
        TypeError: No floating-point tensor.
        ValueError: Shape or device do not fit the weight.
    """
    check_floating("magnitude", magnitude)
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(
            f"expected magnitude with shape ({weight.shape[0]},) for a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(magnitude.shape)}"
        )
    check_same_device({"weight": weight, "magnitude": magnitude})


def check_adapter(
    h: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | str | None,
    *,
    activation: str,
    dropout: float,
) -> None:
    """Refuse arguments that :func:`fastlora.functional.adapter` can't serve.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes, devices, the activation or dropout do not fit.
    """
    if isinstance(residual, str) and residual != "input":
        raise ValueError(f"expected residual to be 'input', a tensor or None, got {residual!r}")
    optional = {
        "down_bias": down_bias,
        "up_bias": up_bias,
        "residual": None if isinstance(residual, str) else residual,
    }
    given = {"h": h, "down_weight": down_weight, "up_weight": up_weight}
    given |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in given.items():
        check_floating(name, tensor)
    _check_adapter_shapes(h, down_weight, given)
    check_same_device(given)
    check_dropout(dropout)
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation out of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_adapter_size(size: int, widest: int) -> None:
    """Refuse a bottleneck that is too wide for the kernels."""
    if size > widest:
        raise ValueError(
            f"backend 'triton' serves bottlenecks up to {widest}, got {size}; "
            "use fastlora.set_backend('torch') or 'auto' for wider ones"
        )


def check_compute_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse a base layer in another dtype than x, as ``nn.Linear`` does outside autocast."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(
                f"expected {name} in x's dtype {x.dtype}, got {tensor.dtype}; convert one of them, or run "
                f"under torch.autocast({x.device.type!r})"
            )


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse anything but a dense or nested float64, float32, float16 or bfloat16 tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} to be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout not in (torch.strided, torch.jagged):
        raise TypeError(f"expected {name} to be dense, got layout {tensor.layout}; use .to_dense()")
    if tensor.dtype in FLOATING_DTYPES:
        return
    advice = (
        "give a quantised layer's weight as fastlora.ops.weights.read.frozen_weight(layer), or dequantise it"
        if name == "weight"
        else "convert it with .to(torch.float32)"
    )
    raise TypeError(f"expected {name} in float64, float32, float16 or bfloat16, got {tensor.dtype}; {advice}")


def check_same_device(tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that are on different devices."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) <= 1:
        return
    placed = ", ".join(f"{name} on {device}" for name, device in devices.items())
    advice = "move them to one device with .to(device)"
    if any(device.type == "meta" for device in devices.values()):
        advice = (
            "a meta tensor holds no data, materialise it first (module.to_empty(...) and load its weights)"
        )
    raise ValueError(f"expected all tensors on one device, got {placed}; {advice}")


def check_dropout(dropout: float) -> None:
    """Refuse a dropout probability outside [0, 1]."""
    _check_number("dropout", dropout)
    if not 0 <= dropout <= 1:
        raise ValueError(f"expected a dropout probability in [0, 1], got {dropout!r}")


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> None:
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.dim() != 2:
            raise ValueError(f"expected {name} with 2 dimensions, got shape {tuple(tensor.shape)}")
    out_features, in_features = weight.shape
    rank = lora_A.shape[0]
    # not shape: nested tensors of the strided layout have none
    if x.dim() == 0 or x.size(-1) != in_features:
        raise ValueError(
            f"expected x with last dimension {in_features} (weight is {tuple(weight.shape)}), "
            f"got shape {tuple(x.shape)}"
        )
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got lora_A with shape {tuple(lora_A.shape)}")
    if lora_A.shape[1] != in_features or tuple(lora_B.shape) != (out_features, rank):
        raise ValueError(
            f"expected lora_A [rank, {in_features}] and lora_B [{out_features}, rank] for a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"expected bias with shape ({out_features},), got {tuple(bias.shape)}")


def _check_adapter_shapes(h: Tensor, down_weight: Tensor, given: dict[str, Tensor]) -> None:
    if down_weight.dim() != 2 or 0 in down_weight.shape:
        raise ValueError(
            "expected down_weight [adapter_size, hidden_size], both at least 1, got shape "
            f"{tuple(down_weight.shape)}"
        )
    size, hidden = down_weight.shape
    if h.dim() == 0 or h.size(-1) != hidden:
        raise ValueError(
            f"expected h with last dimension {hidden} (down_weight is {tuple(down_weight.shape)}), "
            f"got shape {tuple(h.shape)}"
        )
    expected = {
        "down_bias": (size,),
        "up_weight": (hidden, size),
        "up_bias": (hidden,),
    }
    if "residual" in given:
        expected["residual"] = tuple(h.shape)
    for name, shape in expected.items():
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(
                f"expected {name} of shape {shape} for h [..., {hidden}] and down_weight "
                f"{tuple(down_weight.shape)}, got {tuple(given[name].shape)}"
            )


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int | float | torch.SymFloat) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
