"""Gradient reversal against finite differences, its schedule against the closed form, the model it serves."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora
from fastlora import (
    DomainAdaptationModel,
    GradientReversal,
    GradientReversalLayer,
    ReversalSchedule,
    gradient_reversal,
)
from fastlora.domain.norms import adapt_batch_norm


@pytest.mark.parametrize("alpha", [0.0, 0.7, 3])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_gradient_is_minus_alpha_times_the_finite_difference(alpha: float, as_tensor: bool) -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor([alpha]) if as_tensor else alpha
    gradient_reversal(x, factor).sin().sum().backward()
    step = 1e-6
    differences = torch.empty_like(x)
    for index in range(x.numel()):
        moved = [x.detach().clone() for _ in range(2)]
        moved[0].flatten()[index] += step
        moved[1].flatten()[index] -= step
        differences.flatten()[index] = (moved[0].sin().sum() - moved[1].sin().sum()) / (2 * step)
    torch.testing.assert_close(x.grad, -alpha * differences, rtol=1e-6, atol=1e-8)


def test_forward_is_the_identity_in_new_memory() -> None:
    x = torch.randn(4, requires_grad=True)
    y = gradient_reversal(x, 1.0)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    assert not y._is_view()
    y.add_(1.0).sum().backward()
    assert torch.equal(x.grad, -torch.ones(4))  # type: ignore[arg-type]


def test_alpha_gets_no_gradient_and_the_function_is_the_seeds() -> None:
    x, alpha = torch.ones(2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    gradient_reversal(x, alpha).sum().backward()
    assert alpha.grad is None
    x.grad = None
    GradientReversal.apply(x, 0.5).sum().backward()
    assert torch.equal(x.grad, torch.tensor([-0.5, -0.5]))  # type: ignore[arg-type]


def test_second_derivatives_and_dtypes() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(gradient_reversal(x, 2.0).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, -6 * x**2)
    # the second time around the gradient passes the same reversal: −2 · (−2 · 6x)
    torch.testing.assert_close(second, 24 * x)
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    gradient_reversal(half, torch.tensor(0.5)).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_a_compiled_model_does_not_recompile_when_alpha_changes() -> None:
    compiles = 0

    def backend(graph: Any, example: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return graph.forward

    schedule = ReversalSchedule(10)
    model = nn.Sequential(nn.Linear(3, 2), GradientReversalLayer(schedule), nn.Linear(2, 1))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 3)
    for _ in range(4):
        compiled(x).sum().backward()
        schedule.advance()
    assert compiles == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "told"),
    [
        ((torch.ones(2, dtype=torch.int64), 1.0), TypeError, "floating-point tensor, got torch.int64"),
        (([1.0], 1.0), TypeError, "got list"),
        ((torch.ones(2), "1"), TypeError, "alpha as a number or a tensor, got str"),
        ((torch.ones(2), torch.ones(2)), ValueError, r"one number, got a tensor of shape \(2,\)"),
    ],
)
def test_bad_arguments(arguments: Any, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        gradient_reversal(*arguments)


def test_the_schedule_is_the_closed_form_across_a_resumption() -> None:
    schedule = ReversalSchedule(total_steps=50, gamma=10.0)
    for step in range(60):
        if step == 20:
            state = copy.deepcopy(schedule.state_dict())
            schedule = ReversalSchedule(total_steps=50, gamma=10.0)
            schedule.load_state_dict(state)
        progress = min(step / 50, 1.0)
        expected = 2 / (1 + math.exp(-10 * progress)) - 1
        assert schedule().item() == pytest.approx(expected, abs=1e-6)
        schedule.advance()
    assert [round(ReversalSchedule(2400).forward().item(), 3)] == [0.0]


def test_adatimes_slip_is_not_ours() -> None:
    schedule = ReversalSchedule(2400)
    for _ in range(20):
        schedule.advance()
    assert schedule().item() == pytest.approx(0.04, abs=0.005)


@pytest.mark.parametrize("settings", [{"total_steps": 0}, {"total_steps": 5, "gamma": 0.0}])
def test_bad_schedules(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ReversalSchedule(**settings)


def parts(two: bool = False) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    return body, nn.Linear(6, 3), nn.Linear(6, 2 if two else 1)


def batches() -> tuple[tuple[Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(5, 4, generator=generator)
    return (source, torch.tensor([0, 1, 2, 1, 0])), torch.randn(7, 4, generator=generator) + 1


@pytest.mark.parametrize("two", [False, True])
def test_one_backward_pass_is_two_players_gradients(two: bool) -> None:
    alpha = 0.6
    model = DomainAdaptationModel(*parts(two), alpha=alpha)
    (source, labels), target = batches()
    model.loss((source, labels), target).total.backward()

    body, classifier, domain_classifier = parts(two)
    features = body(torch.cat([source, target]))
    classification = F.cross_entropy(classifier(features[:5]), labels)
    logits = domain_classifier(features)
    if two:
        losses = F.cross_entropy(logits, torch.tensor([0] * 5 + [1] * 7), reduction="none")
    else:
        truth = torch.tensor([0.0] * 5 + [1.0] * 7)
        losses = F.binary_cross_entropy_with_logits(logits.flatten(), truth, reduction="none")
    domain = 0.5 * (losses[:5].mean() + losses[5:].mean())
    # the domain classifier minimises its loss; the features minimise the classes' minus alpha times it
    players = [
        (list(domain_classifier.parameters()), domain, model.domain_classifier),
        (list(body.parameters()), classification - alpha * domain, model.feature_extractor),
        (list(classifier.parameters()), classification, model.classifier),
    ]
    for own, objective, ours in players:
        for expected, parameter in zip(
            torch.autograd.grad(objective, own, retain_graph=True), ours.parameters(), strict=True
        ):
            torch.testing.assert_close(parameter.grad, expected)


def test_forward_is_the_seeds() -> None:
    model = DomainAdaptationModel(*parts(), alpha=1.0)
    x = torch.randn(5, 4)
    logits, domains = model(x, torch.zeros(5))
    assert torch.equal(model(x), logits)
    assert domains.shape == (5, 1)
    with pytest.raises(ValueError, match="expected a domain label for each of 5 inputs, got 4"):
        model(x, torch.zeros(4))


def test_loss_reports_and_advances_only_in_training() -> None:
    schedule = ReversalSchedule(10)
    model = DomainAdaptationModel(*parts(), alpha=schedule)
    loss = model.loss(*batches())
    torch.testing.assert_close(loss.total, loss.classification + loss.alignment)
    assert loss.domain_accuracy is not None
    assert 0 <= loss.domain_accuracy <= 1
    model.eval().loss(*batches())
    assert schedule.step == 1
    assert "reversal.alpha.step" in model.state_dict()
    with pytest.raises(ValueError, match="expected examples of both domains, got 5 of the source and 0"):
        model.loss(batches()[0], torch.empty(0, 4))


def test_only_lora_trains_where_only_lora_may() -> None:
    body, classifier, domain_classifier = parts()
    fastlora.apply_lora(body, rank=2)
    model = DomainAdaptationModel(body, classifier, domain_classifier)
    model.loss(*batches()).total.backward()
    trained = {name for name, p in model.feature_extractor.named_parameters() if p.grad is not None}
    assert trained == {"0.lora_A", "0.lora_B"}


def test_domains_have_statistics_of_their_own() -> None:
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    model = DomainAdaptationModel(body, nn.Linear(6, 3), nn.Linear(6, 1), separate_batch_norm=True)
    source, target = batches()
    for _ in range(200):
        model.loss(source, target)
    norms = model.feature_extractor.get_submodule("1.norms")
    linear = model.feature_extractor.get_submodule("0")
    with torch.no_grad():
        for name, inputs in (("source", source[0]), ("target", target)):
            mean = norms.get_buffer(f"{name}.running_mean")
            torch.testing.assert_close(mean, linear(inputs).mean(0), rtol=1e-4, atol=1e-5)
    assert norms.get_parameter("source.weight") is norms.get_parameter("target.weight")
    model.eval()
    default = model(target)
    with model.domain("target"):
        assert torch.equal(model(target), default)
    with model.domain("source"):
        assert not torch.equal(model(target), default)
    with (
        pytest.raises(ValueError, match="expected a domain out of source, target, got 'moon'"),
        model.domain("moon"),
    ):
        pass


def test_adabn_takes_the_targets_statistics_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = torch.randn(30, 4) + 2
    assert adapt_batch_norm(model, [(batch, None) for batch in data.split(10)]) == 1
    hidden = model[0](data)
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert model[1].momentum == 0.1
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="got none; nothing was changed"):
        adapt_batch_norm(model, [])
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="expected a model with BatchNorm layers"):
        adapt_batch_norm(nn.Linear(2, 2), [torch.ones(2, 2)])
