"""The trainer's loss, schedules, parts and stops against what torch says of them."""

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.transfer.training import Trainer, TrainResult, TrainSettings
from fastlora.transfer.training.average import WeightAverage
from fastlora.transfer.training.batches import BatchPlan
from fastlora.transfer.training.checkpoint import Checkpoints
from fastlora.transfer.training.loss import Loss
from fastlora.transfer.training.schedule import make_schedule
from fastlora.transfer.unfreezing import GradualUnfreezing
from tests.training_runs import COUNT, Net, make_net, pictures

PLAIN = TrainSettings(epochs=3, batch_size=8, lr=0.02, precision="no")


def fit(
    output: Path, settings: TrainSettings, net: Net | None = None, **more: Any
) -> tuple[Net, TrainResult]:
    net = make_net(dropout=0.0, batch_norm=False) if net is None else net
    trainer = Trainer(net, pictures(), pictures(), settings, output=output, **more)
    return net, trainer.fit()


def column(output: Path, name: str, file: str = "steps.csv") -> list[float]:
    with (output / file).open() as rows:
        return [float(row[name]) for row in csv.DictReader(rows)]


def assert_same_weights(one: Net, other: Net, rtol: float, atol: float) -> None:
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], rtol=rtol, atol=atol)


def test_it_learns_and_keeps_the_best(tmp_path: Path) -> None:
    settings = replace(PLAIN, epochs=30, ema=0.9)
    net, result = fit(tmp_path, settings)
    assert result.best.accuracy > 0.9
    assert result.best.score("accuracy") == max(record.score("accuracy") for record in result.history)
    images = torch.stack([pictures()[index][0] for index in range(COUNT)])
    right = (net(images).argmax(1) == torch.tensor(pictures().labels)).double().mean().item()
    assert right == result.best.accuracy
    assert result.steps == 90 == len(column(tmp_path, "step"))
    assert column(tmp_path, "accuracy", "epochs.csv") == [record.accuracy for record in result.history]


def test_the_same_seed_gives_the_same_bits_and_another_one_others(tmp_path: Path) -> None:
    nets = [
        fit(tmp_path / str(index), replace(PLAIN, seed=seed, mixup=0.5), make_net())[0]
        for index, seed in enumerate((0, 0, 1))
    ]
    assert_same_weights(nets[0], nets[1], rtol=0, atol=0)
    with pytest.raises(AssertionError):
        assert_same_weights(nets[0], nets[2], rtol=0, atol=0)


@pytest.mark.parametrize("more", [{}, {"class_weights": True, "label_smoothing": 0.1, "mixup": 0.4}])
def test_accumulation_gives_the_whole_batch(tmp_path: Path, more: dict[str, Any]) -> None:
    nets = [fit(tmp_path / str(parts), replace(PLAIN, accumulation=parts, **more))[0] for parts in (1, 2, 3)]
    for net in nets[1:]:
        assert_same_weights(nets[0], net, rtol=1e-4, atol=1e-6)


def test_a_run_is_plain_torch_written_down(tmp_path: Path) -> None:
    settings = replace(PLAIN, label_smoothing=0.1, class_weights=True, restore_best=False, weight_decay=0.0)
    net, _ = fit(tmp_path, settings)
    expected = make_net(dropout=0.0, batch_norm=False)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.02, weight_decay=0.0)
    schedule = make_schedule(optimizer, settings, 9)
    labels = torch.tensor(pictures().labels)
    images = torch.stack([pictures()[index][0] for index in range(COUNT)])
    weights = COUNT / (2 * torch.bincount(labels).float())
    plan, losses = BatchPlan(pictures(), 8, 0), []
    for batch in [batch for epoch in range(3) for batch in plan.batches(epoch)]:
        logits = expected(images[batch])
        each = F.cross_entropy(logits, labels[batch], weights, reduction="none", label_smoothing=0.1)
        loss = each.sum() / weights[labels[batch]].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    assert column(tmp_path, "loss") == pytest.approx(losses, rel=1e-5)
    assert_same_weights(net, expected, rtol=1e-4, atol=1e-6)


def test_mixup_is_the_loss_of_soft_targets() -> None:
    torch.manual_seed(0)
    loss, labels, share = Loss(None, 0.1, 0.4, 0), torch.tensor([0, 1, 1, 1]), 0.3
    inputs, logits = torch.randn(4, 5), torch.randn(4, 2)
    other = [1, 0, 3, 2]
    torch.testing.assert_close(loss.mix(inputs, share), share * inputs + (1 - share) * inputs[other])
    soft = share * F.one_hot(labels, 2) + (1 - share) * F.one_hot(labels[other], 2)
    expected = F.cross_entropy(logits, soft, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(loss.sum(logits, labels, torch.ones(4), share), expected)
    shares = torch.tensor([loss.share(step) for step in range(2000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    # of Beta(a, a): 1 / (4 (2 a + 1))
    assert shares.var().item() == pytest.approx(1 / (4 * 1.8), rel=0.1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, *(1 - index / 7 for index in range(7))]),
        ("cosine", [0.25, 0.5, 0.75, *(0.5 + 0.5 * math.cos(math.pi * index / 7) for index in range(7))]),
    ],
)
def test_schedules_scale_every_group(schedule: Any, expected: list[float]) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, (1.0, 3.0), strict=True)]
    optimizer = torch.optim.SGD(groups)
    scheduler = make_schedule(optimizer, replace(PLAIN, schedule=schedule, warmup=0.3), 10)
    seen = []
    for _ in range(10):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [rate for rate, _ in seen] == pytest.approx(expected)
    assert [rate for _, rate in seen] == pytest.approx([3 * rate for rate in expected])


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_one_cycle_rises_and_falls(steps: int) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_schedule(optimizer, replace(PLAIN, schedule="one_cycle", warmup=0.3), steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen[0] == pytest.approx(1 / 25)
    if steps == 50:
        assert max(seen) == pytest.approx(1.0, abs=0.01)
        assert seen[-1] < 0.01


def test_the_average_is_the_recurrence() -> None:
    layer = torch.nn.Linear(2, 2)
    average, values = WeightAverage(layer, ["weight", "bias"], 0.5), []
    expected = layer.weight.detach().clone()
    for step in range(1, 4):
        with torch.no_grad():
            layer.weight.add_(1.0)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
        values.append(layer.weight.detach().clone())
    with average.swapped_in():
        torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(layer.weight.detach(), values[-1])


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    _, result = fit(tmp_path, replace(PLAIN, epochs=20, lr=1e-7, patience=2))
    assert result.stopped_early
    assert len(result.history) < 20


def test_max_steps_ends_within_an_epoch(tmp_path: Path) -> None:
    _, result = fit(tmp_path, replace(PLAIN, max_steps=4))
    assert (result.steps, [record.step for record in result.history]) == (4, [3, 4])


def test_stages_unfreeze_on_time_and_frozen_statistics_stay(tmp_path: Path) -> None:
    net = make_net(trained_stages=0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    settings = replace(PLAIN, restore_best=False)
    _, result = fit(tmp_path, settings, net, unfreezing=GradualUnfreezing((1, 2)))
    assert [record.trained_stages for record in result.history] == [0, 1, 2]
    changed = {
        name.split(".")[1]
        for name, value in net.state_dict().items()
        if "layers" in name and not torch.equal(value, before[name])
    }
    assert changed == {"1", "2"}
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(net.state_dict()[f"layers.0.norm.{name}"], before[f"layers.0.norm.{name}"])


class Poison:
    """Makes one picture infinite from its second use on."""

    def __init__(self) -> None:
        self.uses = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        poisoned = torch.equal(pixels, pictures()[7][0])
        self.uses += poisoned
        return pixels * float("inf") if poisoned and self.uses > 1 else pixels

    def __repr__(self) -> str:
        return "Poison()"


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    net = make_net(batch_norm=False)
    trainer = Trainer(net, pictures(Poison()), pictures(), PLAIN, output=tmp_path)
    with pytest.raises(FloatingPointError, match=r"expected a finite loss, got nan at step \d on .*\b7\.png"):
        trainer.fit()
    assert all(weight.isfinite().all() for weight in net.parameters())
    found = Checkpoints(tmp_path / "checkpoints").latest()
    assert found is not None
    assert found[0] in (3, 6)


def test_two_trainings_in_one_process_may_differ_in_precision(tmp_path: Path) -> None:
    precisions: tuple[Any, ...] = ("no", "bf16", "no")
    for index, precision in enumerate(precisions):
        _, result = fit(tmp_path / str(index), replace(PLAIN, precision=precision))
        assert result.steps == 9


def test_tensorboard_and_csv_hold_the_same(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="reads with TensorBoard, which is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, PLAIN)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(column(tmp_path, "loss"))
    accuracies = [event.value for event in board.Scalars("validation/accuracy")]
    assert accuracies == pytest.approx(column(tmp_path, "accuracy", "epochs.csv"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 0}, "expected epochs as an integer of at least 1, got 0"),
        ({"schedule": "step"}, "expected schedule out of cosine, linear, one_cycle, constant, got 'step'"),
        ({"label_smoothing": 1.0}, "expected label_smoothing from 0 to 1, got 1.0"),
        ({"warmup": 1.5}, "expected warmup from 0 to 1, got 1.5"),
        ({"ema": 1.0}, "expected ema from 0 to 1, got 1.0"),
        ({"clip_norm": -1.0}, "expected clip_norm from 0 to inf, got -1.0"),
        ({"mixup": -1.0}, "expected mixup from 0 to inf, got -1.0"),
        ({"seed": -1}, "expected seed from 0 to 4,294,967,295, got -1"),
        ({"schedule": "one_cycle", "warmup": 0.0}, "expected warmup above 0 and below 1 for one_cycle"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(PLAIN, **changes)


def test_what_can_not_be_trained_is_refused(tmp_path: Path) -> None:
    other = replace(pictures(), classes=("light", "dark"))
    with pytest.raises(ValueError, match="expected the same classes in training and validation"):
        Trainer(make_net(), pictures(), other, PLAIN, output=tmp_path)
    with pytest.raises(ValueError, match="expected pictures for validation, got none"):
        Trainer(make_net(), pictures(), pictures().subset([]), PLAIN, output=tmp_path)
    with pytest.raises(ValueError, match="something trains, got one with every parameter frozen"):
        Trainer(make_net().requires_grad_(False), pictures(), pictures(), PLAIN, output=tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match="choose another --output"):
        Trainer(make_net(), pictures(), pictures(), PLAIN, output=file / "run")
