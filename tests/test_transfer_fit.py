"""The training loop and the linear probe."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora.transfer.data.bundled import ImageSet
from fastlora.transfer.fit import Examples, Fit, FitSettings, Task
from fastlora.transfer.probe import StandardisedLinear, extract_features, mirrored, probe_task
from fastlora.transfer.training.device import make_accelerator

SETTINGS = FitSettings(epochs=4, batch_size=8, learning_rate=0.05)


@pytest.fixture
def accelerator() -> Any:
    return make_accelerator()


def blobs(count: int, seed: int) -> Examples:
    """Two classes, told apart by the sign of their first value."""
    labels = torch.arange(count) % 2
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    inputs[:, 0] = (labels * 2 - 1) * (inputs[:, 0].abs() + 0.5)
    return Examples(inputs, labels)


def task(augment: float = 0.0) -> Task:
    def noisy(inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + augment * torch.randn(inputs.shape, generator=generator)

    return Task(blobs(60, 0), blobs(40, 1), augment=noisy, prepare=lambda inputs: inputs)


def run(settings: FitSettings, accelerator: Any, *, seed: int = 0, data: Task | None = None) -> Fit:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    fit = Fit(model, data or task(), settings, accelerator, seed=seed, on_step=lambda *step: None)
    while not fit.finished:
        fit.run_epoch()
    return fit


def test_fit_learns_and_leaves_frozen_parameters(accelerator: Any) -> None:
    torch.manual_seed(0)
    frozen = nn.Linear(4, 8).weight
    fit = run(SETTINGS, accelerator)
    assert [epoch.epoch for epoch in fit.history] == [1, 2, 3, 4]
    assert fit.history[-1].loss < 0.5 * fit.history[0].loss
    assert fit.history[-1].validation_accuracy > 0.85
    assert torch.equal(accelerator.unwrap_model(fit.model)[0].weight.cpu(), frozen)
    examples = task().validation
    right = (fit.predict(examples.inputs) == examples.labels).double().mean().item()
    assert right == fit.history[-1].validation_accuracy


def test_same_seed_same_bits(accelerator: Any) -> None:
    weights = [
        run(SETTINGS, accelerator, seed=seed, data=task(augment=0.5)).model[2].weight for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("max_steps", "epochs"), [(1, 1), (8, 1), (9, 2), (1000, 4)])
def test_max_steps_ends_the_run(max_steps: int, epochs: int, accelerator: Any) -> None:
    steps: list[tuple[int, int]] = []
    fit = Fit(
        nn.Linear(4, 2),
        task(),
        replace(SETTINGS, max_steps=max_steps),
        accelerator,
        seed=0,
        on_step=lambda done, total, loss: steps.append((done, total)),
    )
    while not fit.finished:
        fit.run_epoch()
    total = min(max_steps, 32)
    assert steps == [(done, total) for done in range(1, total + 1)]
    assert len(fit.history) == epochs


def test_rate_rises_then_falls_to_zero(accelerator: Any) -> None:
    settings = replace(SETTINGS, epochs=5, warmup=0.25)
    rates: list[float] = []
    fit = Fit(
        nn.Linear(4, 2),
        task(),
        settings,
        accelerator,
        seed=0,
        on_step=lambda *step: rates.append(fit._schedule.get_last_lr()[0]),
    )
    while not fit.finished:
        fit.run_epoch()
    peak = rates.index(max(rates))
    assert max(rates) == settings.learning_rate
    assert peak == 9
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_head_learns_faster(accelerator: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].bias.requires_grad_(False)
    fit = Fit(
        model,
        task(),
        replace(SETTINGS, head_factor=10.0, max_steps=1, warmup=0.0),
        accelerator,
        seed=0,
        on_step=lambda *step: None,
        head=model[2],
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    fit.run_epoch()
    body, frozen, *head = (
        (new.cpu() - old).abs().max().item() for new, old in zip(model.parameters(), before, strict=True)
    )
    # AdamW's first step is as long as the rate, whatever the gradient
    assert body == pytest.approx(0.05, rel=0.05)
    assert head == pytest.approx([0.5, 0.5], rel=0.05)
    assert frozen == 0


def test_loss_that_is_not_finite(accelerator: Any) -> None:
    data = task()
    data.train.inputs[3] = float("inf")
    with pytest.raises(FloatingPointError, match=r"expected a finite loss, got nan at step \d+; lower"):
        run(SETTINGS, accelerator, data=data)


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"batch_size": 0}, {"max_steps": 0}, {"warmup": 1.5}, {"warmup": -0.1}], ids=str
)
def test_settings_out_of_range(change: dict[str, Any], accelerator: Any) -> None:
    with pytest.raises(ValueError, match=rf"expected {next(iter(change))} .* got"):
        run(replace(SETTINGS, **change), accelerator)


def test_missing_accelerate_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r'training needs .*pip install "fastlora-triton\[demo\]"'):
        make_accelerator()


def test_probe_standardises_in_float32() -> None:
    features = torch.randn(50, 6) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 0.0]) + 7
    head = StandardisedLinear(features, 3)
    nn.init.normal_(head.linear.weight)
    standard = (features - features.mean(0)) / features.std(0, correction=0).clamp_min(1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    torch.testing.assert_close(logits, standard @ head.linear.weight.T)
    assert standard[:, 0].std(correction=0).item() == pytest.approx(1, rel=1e-3)


def test_features_of_every_orientation(accelerator: Any) -> None:
    pictures = torch.randint(0, 256, (70, 1, 2, 2), dtype=torch.uint8)
    variants = mirrored(ImageSet("", "", ("a",), pictures, torch.zeros(70).long(), (-1, -2)))
    assert [v[0, 0].flatten().tolist() for v in variants] == [
        pictures[0, 0].flatten()[list(order)].tolist()
        for order in ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))
    ]
    counts: list[int] = []
    backbone = nn.Sequential(nn.Flatten(), nn.Identity()).to(accelerator.device)
    features = extract_features(backbone, variants, accelerator, counts.append)
    assert features.shape == (70, 4, 12)
    assert sum(counts) == 280
    assert torch.equal(features[:, 3].view(70, 3, 4).flip(-1), features[:, 0].view(70, 3, 4))


def test_probe_trains_on_all_variants_and_judges_the_first() -> None:
    features = torch.arange(4.0).expand(500, 4)[..., None]
    data = probe_task(Examples(features, torch.zeros(500).long()), Examples(features, torch.zeros(500)))
    drawn = data.augment(features, torch.Generator().manual_seed(0))
    assert drawn.shape == (500, 1)
    assert drawn.flatten().long().bincount(minlength=4).min() > 80
    assert torch.equal(data.prepare(features), torch.zeros(500, 1))
