"""What has to be the same for a run to go on where it stopped."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from fastlora.transfer.data import LabelledImages
from fastlora.transfer.training.batching import leaves_one
from fastlora.transfer.training.settings import NOT_COMPARED, TrainSettings
from fastlora.transfer.training.whole import digest

_EXPLAINED = {
    "frozen_weights": "the frozen weights differ: another pretrained model, or random ones of another seed",
    "layout": "names, shapes or dtypes of what trains differ: another model, strategy or rank",
    "training_data": "the training pictures, their labels or their order differ",
    "validation_data": "the validation pictures, their labels or their order differ",
    "last_batch": "another version of fastlora cuts these pictures into other batches",
    "transform": "the training pictures are transformed differently",
}


def fingerprint(
    model: nn.Module,
    saved: list[str],
    train: LabelledImages,
    validation: LabelledImages,
    settings: TrainSettings,
    configuration: Mapping[str, Any],
) -> dict[str, Any]:
    """Values that a resumed run must share with the run it goes on with, each JSON."""
    state = model.state_dict()
    compared = {name: value for name, value in asdict(settings).items() if name not in NOT_COMPARED}
    layout = [[name, str(state[name].dtype), list(state[name].shape)] for name in saved]
    parameters = dict(model.named_parameters())
    joined = {"last_batch": "joined"} if leaves_one(len(train), settings.batch_size) else {}
    frozen = [(name, tensor) for name, tensor in state.items() if name in parameters and name not in saved]
    return {
        **json.loads(json.dumps(dict(configuration))),
        **compared,
        **joined,
        "layout": hashed(layout),
        "frozen_weights": digest(frozen),
        "training_data": hashed([train.classes, train.labels, train.names]),
        "validation_data": hashed([validation.classes, validation.labels, validation.names]),
        # a function shows where it lies in memory, which differs from process to process
        "transform": re.sub(r" at 0x[0-9a-f]+", "", repr(train.transform)),
    }


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of another configuration.

    Raises:
        ValueError: Something differs; all of it is listed.
    """
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    told = [_EXPLAINED.get(n, f"{n} was {before.get(n)!r}, is {now.get(n)!r} now") for n in names]
    if told:
        raise ValueError(
            f"expected the configuration that the run began with, but {'; '.join(told)}; "
            "give the same, or start a new run in another folder"
        )


def hashed(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
