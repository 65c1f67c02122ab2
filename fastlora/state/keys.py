"""Names in adapter files as the model that reads them has them, whatever wrapped the one that wrote them."""

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from fastlora.anatomy.names import clean_name, named_modules
from fastlora.state.folder import AdapterFile
from fastlora.state.slots import LORA_KEY, PREFIX

_PARALLEL = "module."


def in_model_names(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """A file's tensors under the keys of an unwrapped model; the config knows what they were called before.

    PEFT keeps what ``torch.compile``, data parallelism and activation checkpointing put into names, and its
    own prefix where a model was wrapped twice.

    Raises:
        ValueError: Two keys mean the same tensor, or a model wrapped twice has layers that the config, which
            is the outer one's, does not name.
    """
    tensors, config = file.tensors, file.config
    own = {name.partition(".")[0] for name in named_modules(model)}
    keys = {key: _model_key(key, own) for key in tensors}
    first: dict[str, str] = {}
    for key, model_key in keys.items():
        if first.setdefault(model_key, key) != key:
            raise ValueError(
                f"expected one tensor for {model_key}, got {first[model_key]} and {key}; save it again"
            )
    renamed = {keys[key]: tensor for key, tensor in tensors.items()}
    if config.lora is None:
        return replace(file, tensors=renamed)
    file_names = {
        new[1]: old[1]
        for key in tensors
        if (old := LORA_KEY.fullmatch(key)) and (new := LORA_KEY.fullmatch(keys[key])) and old[1] != new[1]
    }
    twice = [old for old in file_names.values() if old.startswith(PREFIX) and not config.lora.targets(old)]
    if twice:
        raise ValueError(
            f"expected the adapter of one PeftModel, got one put around another: {twice[0]!r} first is not "
            "among target_modules, so rank and alpha of the inner one are not in the file; save the inner "
            "one by itself"
        )
    config = replace(config, lora=replace(config.lora, file_names=file_names))
    return replace(file, tensors=renamed, config=config)


def _model_key(key: str, own: Collection[str]) -> str:
    rest = key.removeprefix(_PARALLEL)
    if not rest.startswith(PREFIX):
        return key
    rest = clean_name(rest.removeprefix(PREFIX))
    while rest.partition(".")[0] not in own:
        shorter = clean_name(rest.removeprefix(_PARALLEL).removeprefix(PREFIX))
        if shorter == rest:
            break
        rest = shorter
    return PREFIX + rest
