"""What a forward pass keeps for backward, by module, seen through autograd's saved-tensor hooks."""

import contextlib
import copy
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Call:
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, model: nn.Module) -> Any:
        """Call it."""
        return model(*self.args, **self.kwargs)


def kept_by_module(model: nn.Module, sample_input: object, *, execute: bool) -> dict[str, int]:
    """Bytes that each module's forward keeps for backward, by the module's name.

    Raises:
        TypeError: ``sample_input`` is nothing to call a model with.
        ValueError: ``execute`` with tensors on the meta device, or the forward pass fails.
    """
    device = _device(model)
    call = _call(model, sample_input, device if execute else torch.device("meta"))
    if execute:
        _check_values(model, call)
    run = _run_for_real if execute else _run_on_shapes
    # what a user compiled runs as written: shapes without values would be compiled for nothing
    eager = torch.compiler.set_stance("force_eager")
    try:
        with torch.inference_mode(False), torch.enable_grad(), eager:
            return run(model, call, device)
    except Exception as error:
        advice = "check its shape and dtype"
        if not execute:
            advice += "; a model that looks at values, or can't be copied, needs execute=True"
        raise ValueError(
            f"expected sample_input to be what {type(model).__name__} can run on, got an input with which "
            f"it fails with {type(error).__name__}: {_first_line(error)}; {advice}"
        ) from error


class _Held:
    """A tensor saved for backward; dies with the part of the graph that keeps it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Ledger:
    """Who saved what."""

    def __init__(self) -> None:
        self._running = [""]
        self._saved: list[tuple[str, weakref.ref[_Held]]] = []

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Write down what autograd saves inside, and which of the modules is running then."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._on_enter(name)))
            handles.append(module.register_forward_hook(self._on_leave, always_call=True))
        try:
            with saved_tensors_hooks(self._pack, lambda held: held.tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def settle(self, resident: Iterable[Tensor]) -> dict[str, int]:
        """Bytes by module of what is held by now, without the resident tensors; each storage once."""
        seen = {_storage(tensor)[0] for tensor in resident}
        bytes_by_module: dict[str, int] = {}
        for name, reference in self._saved:
            held = reference()
            if held is not None:
                key, size = _storage(held.tensor)
                if key not in seen:
                    bytes_by_module[name] = bytes_by_module.get(name, 0) + size
                seen.add(key)
        return bytes_by_module

    def _pack(self, tensor: Tensor) -> _Held:
        # the tensor itself would hold the graph that holds it: an operation may save its own result
        held = _Held(tensor.detach())
        self._saved.append((self._running[-1], weakref.ref(held)))
        return held

    def _on_enter(self, name: str) -> Any:
        return lambda module, args: self._running.append(name)

    def _on_leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()


def _storage(tensor: Tensor) -> tuple[int, int]:
    # sparse tensors have no storage of their own
    if tensor.layout != torch.strided:
        return id(tensor), 0
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def _run_on_shapes(model: nn.Module, call: Call, device: torch.device) -> dict[str, int]:
    # torch's own way to run a model without its values, as torch.export does; not public, hence only here
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def shape_of(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return mode.from_tensor(tensor)
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    originals = [*model.parameters(), *model.buffers()]
    # deepcopy takes from its memo what is there already
    memo = {id(tensor): shape_of(tensor) for tensor in originals if tensor.is_meta}
    with FakeCopyMode(mode):
        shapes = copy.deepcopy(model, memo)
    call = _map_tensors(call, shape_of)
    ledger = _Ledger()
    with mode, ledger.watch(shapes), _quiet():
        output = call.run(shapes)
    # a hook that holds a parameter itself, not the copy's, gets the mode's version of it
    also = [mode.from_tensor(tensor) for tensor in originals if not tensor.is_meta]
    kept = ledger.settle([*shapes.parameters(), *shapes.buffers(), *also])
    del output
    return kept


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # torch logs a traceback of its own for a failure that we report
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _run_for_real(model: nn.Module, call: Call, device: torch.device) -> dict[str, int]:
    ledger = _Ledger()
    with _same_random_state(device), _same_buffers(model), ledger.watch(model):
        output = call.run(model)
        kept = ledger.settle([*model.parameters(), *model.buffers()])
    del output
    return kept


def _same_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


@contextlib.contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    places = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    values = {id(buffer): buffer.detach().clone() for _, _, buffer in places}
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer in places:
                module._buffers[name] = buffer
                # left alone where nothing changed: somebody's graph may hold it in this version
                if not torch.equal(buffer, values[id(buffer)]):
                    buffer.copy_(values[id(buffer)])


def _call(model: nn.Module, sample_input: object, device: torch.device) -> Call:
    if isinstance(sample_input, Tensor):
        return Call((sample_input,), {})
    if isinstance(sample_input, Mapping):
        return Call((), dict(sample_input))
    if isinstance(sample_input, Sequence) and not isinstance(sample_input, str | bytes) and sample_input:
        if not all(isinstance(size, int) for size in sample_input):
            return Call(tuple(sample_input), {})
        if min(sample_input) >= 0:
            floating = (p.dtype for p in model.parameters() if p.is_floating_point())
            dtype = next(floating, torch.get_default_dtype())
            return Call((torch.zeros(tuple(sample_input), dtype=dtype, device=device),), {})
    raise TypeError(
        "expected sample_input as a tensor, a shape, a tuple of arguments or a mapping of keyword arguments, "
        f"got {sample_input!r}; use (1, 3, 224, 224), say"
    )


def _device(model: nn.Module) -> torch.device:
    """Where the model's values are; the CPU for a model without any."""
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _check_values(model: nn.Module, call: Call) -> None:
    inputs = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers(), *inputs)):
        raise ValueError(
            "expected weights and inputs with values for execute=True, got some on the meta device; "
            "leave execute out to run on shapes alone"
        )


def _map_tensors(call: Call, convert: Any) -> Call:
    def converted(leaf: object) -> object:
        return convert(leaf) if isinstance(leaf, Tensor) else leaf

    return Call(tree_map(converted, call.args), tree_map(converted, call.kwargs))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
