"""No batch of one picture, which a BatchNorm that trains can't normalise, however many pictures there are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora.domain.norms import adapt_batch_norm
from fastlora.transfer.training import Trainer, TrainSettings
from fastlora.transfer.training.batches import BatchPlan
from fastlora.transfer.training.batching import count_batches, cut
from fastlora.transfer.training.fingerprint import check_same, fingerprint
from tests.domain_runs import make_domain_trainer
from tests.training_runs import make_net, pictures


class Pooled(nn.Module):
    """A BatchNorm of one value per channel and example, as a deep network has on small pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(x.mean((2, 3), keepdim=True)).flatten(1))
        return y


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_an_epoch_in_batches(batch_size: int) -> None:
    for examples in range(1, 30):
        batches = cut(torch.arange(examples), batch_size)
        assert torch.equal(torch.cat(batches), torch.arange(examples))
        assert len(batches) == count_batches(examples, batch_size)
        sizes = [len(batch) for batch in batches]
        assert max(sizes) <= batch_size + 1
        assert min(sizes) > 1 or batch_size == 1 or examples == 1
        assert all(size == batch_size for size in sizes[:-1])


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 1), (4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("examples", [9, 10, 11, 12, 17])
def test_parts_of_a_batch(examples: int, accumulation: int, processes: int) -> None:
    images = pictures().subset(range(examples))
    seen = list[int]()
    for rank in range(processes):
        plan = BatchPlan(images, 8, 0, accumulation, rank, processes)
        for parts in plan.load(0, 0, workers=0):
            assert len(parts) == accumulation
            assert all(len(part.inputs) > 1 for part in parts)
            seen += [int(name.removesuffix(".png")) for part in parts for name in part.names]
    assert sorted(seen) == list(range(examples))


def test_full_batches_leave_one_out() -> None:
    sizes = {
        n: [len(b) for b in BatchPlan(pictures().subset(range(n)), 4, 0, full=True).batches(0)]
        for n in (8, 9, 10)
    }
    assert sizes == {8: [4, 4], 9: [4, 4], 10: [4, 4, 4]}


def test_training_with_one_picture_over(tmp_path: Path) -> None:
    images = pictures().subset(range(9))
    settings = TrainSettings(epochs=2, batch_size=4, warmup=0.0)
    trainer = Trainer(Pooled(), images, images, settings, output=tmp_path)
    assert trainer.fit().steps == trainer.total_steps == 4


def test_batches_of_one_that_were_asked_for(tmp_path: Path) -> None:
    images = pictures().subset(range(4))
    trainer = Trainer(Pooled(), images, images, TrainSettings(epochs=1, batch_size=1), output=tmp_path)
    with pytest.raises(ValueError, match=r"two or more examples .* raise batch_size, lower accumulation"):
        trainer.fit()


def test_adapting_with_one_picture_over(tmp_path: Path) -> None:
    # 22 pictures of each domain
    settings = TrainSettings(epochs=1, batch_size=7, warmup=0.0)
    trainer = make_domain_trainer(make_net(), settings, tmp_path)
    assert trainer.fit().steps == 3


def test_statistics_of_a_target_with_one_picture_over() -> None:
    model, inputs = Pooled(), torch.rand(9, 3, 4, 4)
    adapt_batch_norm(model, inputs.split(4))
    seen = inputs.mean((2, 3))
    torch.testing.assert_close(model.norm.running_mean, (seen[:4].mean(0) + seen[4:].mean(0)) / 2)


def test_runs_that_cut_otherwise_are_not_gone_on_with() -> None:
    def of(count: int) -> dict[str, Any]:
        images, net = pictures().subset(range(count)), make_net()
        return fingerprint(net, list(net.state_dict()), images, images, TrainSettings(batch_size=4), {})

    assert "last_batch" not in of(8)
    before = {name: value for name, value in of(9).items() if name != "last_batch"}
    with pytest.raises(ValueError, match="another version of fastlora cuts these pictures"):
        check_same(before, of(9))
