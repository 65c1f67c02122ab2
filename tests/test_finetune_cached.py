"""A head trained on cached features is the head trained on pictures, in the same precision."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.transfer.data import LabelledImages
from fastlora.transfer.finetune.cached import HeadOnly, features_of
from fastlora.transfer.training import Trainer, TrainSettings
from fastlora.transfer.training.device import make_accelerator
from tests.training_runs import COUNT, Net, make_net, pictures


def frozen_net() -> Net:
    return make_net(trained_stages=0, dropout=0.0, batch_norm=False)


def features(net: Net, folder: Path, accelerator: Any) -> LabelledImages:
    net.eval().to(accelerator.device)
    return features_of(net, net.head, pictures(), folder, COUNT, lambda done, total: None, accelerator)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_features_are_what_the_head_reads_in_the_precision_of_the_run(precision: str, tmp_path: Path) -> None:
    net, accelerator = frozen_net(), make_accelerator(precision)
    found = features(net, tmp_path, accelerator)
    rows = torch.stack([found[index][0] for index in range(COUNT)])
    pixels = torch.stack([pictures()[index][0] for index in range(COUNT)])
    with torch.no_grad(), accelerator.autocast():
        expected = net(pixels.to(accelerator.device))
        answers = HeadOnly(net.head)(rows.to(accelerator.device))
    assert rows.dtype == torch.float32
    assert torch.equal(answers, expected)


def test_each_precision_has_a_cache_of_its_own(tmp_path: Path) -> None:
    net = frozen_net()
    found = [features(net, tmp_path, make_accelerator(name)) for name in ("no", "bf16", "no", "bf16")]
    rows = [torch.stack([images[index][0] for index in range(COUNT)]) for images in found]
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1], rows[3])
    # bf16 has eight binary digits
    assert 0 < (rows[0] - rows[1]).abs().max() < rows[0].abs().max() / 2**4


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_head_on_cached_features_learns_what_it_learns_on_pictures(precision: Any, tmp_path: Path) -> None:
    settings = TrainSettings(epochs=4, batch_size=8, lr=0.02, precision=precision, restore_best=False)
    whole, cached = frozen_net(), frozen_net()
    Trainer(whole, pictures(), pictures(), settings, output=tmp_path / "whole").fit()
    seen = features(cached, tmp_path / "features", make_accelerator(precision))
    Trainer(HeadOnly(cached.head), seen, seen, settings, output=tmp_path / "cached").fit()
    moved = (whole.head.weight - frozen_net().head.weight.to(whole.head.weight)).abs().max()
    assert moved > 0.05
    # pictures are computed in other batches
    assert (whole.head.weight - cached.head.weight).abs().max() < moved / 50
