"""Which calls of layers that share their input are tuned: a file's, or a model's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora.tuning.calls import LayerCall, SharedCall, calls_of_model, read_calls


def test_calls_of_a_file(tmp_path: Path) -> None:
    """Each layer by itself first, and once."""
    path = tmp_path / "shapes.json"
    entry = {"rows": 8, "inputs": 16, "outputs": 32, "dropout": 0.1, "sharing": [16, 16]}
    path.write_text(json.dumps([entry, entry, {"rows": 8, "inputs": 16, "outputs": 64}]))
    first = LayerCall(8, 16, 32, dropout=0.1)
    other = replace(first, outputs=16)
    assert read_calls(path) == [first, other, LayerCall(8, 16, 64), SharedCall((first, other, other))]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sharing": 16}, "a list of outputs as sharing in entry 1 of .*, got 16"),
        ({"sharing": [0]}, "entry 1 of .*outputs to be a whole number of at least 1, got 0"),
        ({"sharing": [16], "weight": "nf4"}, "entry 1 of .*at least two layers with dense weights"),
        ({"shared": [16]}, "did you mean 'sharing'.*got 'shared'"),
    ],
)
def test_bad_files(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([{"rows": 8, "inputs": 16, "outputs": 32} | entry]))
    with pytest.raises(ValueError, match=message):
        read_calls(path)


class Attention(nn.Module):
    """Query, key and value of one variable, and another layer of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, n) for n in (64, 32, 32))
        self.output = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.output(self.query(x) + torch.cat([self.key(x), self.value(x)], -1))
        return y


def test_calls_of_a_model_include_layers_that_share_their_input() -> None:
    """Of two modules alike once."""
    batch = torch.zeros(2, 5, 64)
    noted: Any = {"rank": 8, "dropout": 0.1, "dtype": "bfloat16"}
    query = LayerCall(10, 64, 64, 8, 0.1)
    key = replace(query, outputs=32)
    found = calls_of_model(nn.Sequential(Attention(), Attention()), batch, **noted)
    assert found == [key, query, SharedCall((query, key, key))]
    # those are computed one by one
    (stored, _) = calls_of_model(Attention(), batch, **noted, weight="nf4")
    assert stored == replace(key, weight="nf4")


class Peeking(nn.Module):
    """Asks for the key of a few rows before its attention runs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        peeked = self.attention.key(x[:, :1]).sum()
        y: Tensor = peeked + self.attention(x)
        return y


def test_calls_of_other_rows_share_nothing() -> None:
    found = calls_of_model(Peeking(), torch.zeros(2, 5, 64), rank=8, dropout=0.0, dtype="bfloat16")
    assert [call for call in found if isinstance(call, SharedCall)] == []
