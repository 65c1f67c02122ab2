"""A module of a frozen model together with the adapter that works at its place."""

import inspect
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastlora.nn.adapter import AdapterLayer

AdapterPlacement = Literal["sequential", "parallel", "residual"]
PLACEMENTS: tuple[AdapterPlacement, ...] = get_args(AdapterPlacement)
WRAPPED = "_adapted"
ADAPTER = "adapter"


class AdaptedModule(nn.Module):
    """Stands where ``module`` stood and adds a bottleneck adapter to what it computes.

    The module shows through: its attributes, indexing, length, and the names in a state dict, to which only
    ``adapter.…`` is added, so a checkpoint of the model without adapters loads and
    :func:`fastlora.remove_adapters` gives the module itself back. What looks its parameters up by hand
    (``torch.func.functional_call``, parametrisations) finds them at :attr:`original_module`.

    Args:
        module: Called as before; returns a tensor, or a tuple that starts with one.
        adapter: As wide as that tensor.
        placement: ``"sequential"``: the output goes through the adapter. ``"parallel"``: the adapter reads
            the module's first argument, and its part is added to the output. ``"residual"``: the module's
            second argument, a residual that it adds itself, goes through the adapter first.

    Raises:
        ValueError: An unknown placement, or a module with an ``adapter`` of its own.

    Example:
        >>> import torch
        >>> block = nn.Sequential(AdaptedModule(nn.Linear(4, 4), AdapterLayer(4, 2), "sequential"))
        >>> [name for name in block.state_dict() if "adapter" not in name]
        ['0.weight', '0.bias']
        >>> block[0].out_features
        4
    """

    adapter: AdapterLayer

    def __init__(self, module: nn.Module, adapter: AdapterLayer, placement: AdapterPlacement) -> None:
        """See the class."""
        check_wrappable(module)
        if placement not in PLACEMENTS:
            raise ValueError(f"expected placement to be one of {PLACEMENTS}, got {placement!r}")
        super().__init__()
        self.placement = placement
        # the first two arguments, to find them when a model gives them by name
        self._argument_names = tuple(inspect.signature(module.forward).parameters)[:2]
        self.register_module(ADAPTER, adapter)
        self._absent_keys: frozenset[str] = frozenset()
        self._register_state_dict_hook(_leave_wrapper_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_report_plain_names)  # type: ignore[no-untyped-call]
        self.train(module.training)
        # last: from here on attributes that are not ours are the module's
        self.register_module(WRAPPED, module)

    @property
    def original_module(self) -> nn.Module:
        """The module as it was, or what stands in its place by now."""
        module = self._modules[WRAPPED]
        assert module is not None
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, with the adapter's part in it."""
        if self.placement == "residual":
            args, kwargs = self._adapt_argument(args, kwargs)
            return self.original_module(*args, **kwargs)
        read = None if self.placement == "sequential" else self._argument(0, args, kwargs)
        version = _version(read)
        out = self.original_module(*args, **kwargs)
        first = out if isinstance(out, Tensor) else _first(out)
        if read is None:
            adapted = self.adapter(first)
        elif _version(read) != version:
            raise RuntimeError(
                "expected a module that leaves its input alone, got one that changes it in place before the "
                "parallel adapter can read it; use inplace=False in it, or another placement"
            )
        else:
            adapted = self.adapter(read, residual=first)
        if isinstance(out, Tensor):
            return adapted
        rest = (adapted, *out[1:])
        return out._make(rest) if hasattr(out, "_make") else rest

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module, for model code such as ``block.mlp.fc1``."""
        modules = self.__dict__.get("_modules", {})
        if name in modules or WRAPPED not in modules or name.startswith("__"):
            return super().__getattr__(name)
        return getattr(modules[WRAPPED], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Attributes that the module has are set there, so ``block.mlp.fc1 = …`` takes effect."""
        modules = self.__dict__.get("_modules", {})
        own = name in self.__dict__ or name in modules or hasattr(type(self), name)
        if WRAPPED in modules and not own and hasattr(modules[WRAPPED], name):
            setattr(modules[WRAPPED], name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Attributes of the module are deleted there."""
        own = name in self.__dict__ or name in self._modules
        if own or not hasattr(self.original_module, name):
            super().__delattr__(name)
        else:
            delattr(self.original_module, name)

    def __len__(self) -> int:
        """Number of parts of the module, where it is a container."""
        return len(self.original_module)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        """A module is true, even one without a length."""
        return True

    def __getitem__(self, key: Any) -> Any:
        """Parts of the module, where it is a container."""
        return self.original_module[key]  # type: ignore[index]

    def _argument(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > position:
            return args[position]
        name = self._argument_names[position] if len(self._argument_names) > position else None
        if name not in kwargs:
            raise TypeError(
                f"expected argument {position + 1} of {type(self.original_module).__name__}, which the "
                f"{self.placement} adapter reads, by position or as {name!r}, got {sorted(kwargs)}"
            )
        return kwargs[name]

    def _adapt_argument(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        adapted = self.adapter(self._argument(1, args, kwargs))
        if len(args) > 1:
            return (args[0], adapted, *args[2:]), kwargs
        return args, {**kwargs, self._argument_names[1]: adapted}

    def _fqn_modifiers(self) -> dict[str, str]:
        # torch.distributed.checkpoint asks: names that the state dict shows without the wrapper's part
        module = self.original_module
        return {name: WRAPPED for name in (*module._modules, *module._parameters, *module._buffers)}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own, inner = f"{prefix}{ADAPTER}.", f"{prefix}{WRAPPED}."
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if not key.startswith((own, inner)):
                state_dict[inner + key[len(prefix) :]] = state_dict.pop(key)
        # a checkpoint of the plain model is complete without an adapter; half an adapter, or none at all to
        # fill meta tensors with, is not
        absent = not any(key.startswith(own) for key in state_dict)
        if absent and not self.adapter.down_proj.weight.is_meta:
            self._absent_keys = frozenset(own + name for name in self.adapter.state_dict())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def check_wrappable(module: nn.Module) -> None:
    """Refuse modules whose output no adapter can follow.

    Raises:
        TypeError: A container that is never called, or a layer whose last dimension is no feature.
        ValueError: The module has an ``adapter`` of its own, whose names in a state dict would be the same.
    """
    kind = type(module).__name__
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        raise TypeError(f"expected a module that is called, got {kind}; name the modules in it")
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase | nn.GroupNorm):
        raise TypeError(
            f"expected a module with features in the last dimension, got {kind}; adapters do not work on "
            "channels that come first"
        )
    if any(ADAPTER in names for names in (module._modules, module._parameters, module._buffers)):
        raise ValueError(
            f"expected a module without an {ADAPTER!r} of its own, got {kind}; choose one inside or around it"
        )


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor was changed in place, where that can be asked."""
    if tensor is None or torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


def _first(out: Any) -> Tensor:
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        return out[0]
    raise TypeError(
        f"expected a module that returns a tensor or a tuple that starts with one, got {type(out).__name__}; "
        "put the adapter at another module"
    )


def _leave_wrapper_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    inner = f"{prefix}{WRAPPED}"
    for names in (state_dict, getattr(state_dict, "_metadata", {})):
        for key in [key for key in names if key == inner or key.startswith(f"{inner}.")]:
            names[_plain(key)] = names.pop(key)


def _report_plain_names(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, AdaptedModule)
    missing = [key for key in incompatible.missing_keys if key not in module._absent_keys]
    incompatible.missing_keys[:] = map(_plain, missing)
    incompatible.unexpected_keys[:] = map(_plain, incompatible.unexpected_keys)
    module._absent_keys = frozenset()


def _plain(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != WRAPPED)
