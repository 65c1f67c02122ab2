"""Everything a run needs, made and checked before the first step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastlora._core.progress import Reporter
from fastlora.anatomy.blocks import find_blocks
from fastlora.anatomy.stages import stages
from fastlora.parameters import ParameterReport, parameter_report
from fastlora.transfer.data import (
    LabelledImages,
    open_images,
    open_parts,
    pretrained_transforms,
    readable,
    stratified_split,
    tell_copies,
    tell_overlap,
)
from fastlora.transfer.finetune.saved import check_takes
from fastlora.transfer.finetune.settings import FinetuneSettings
from fastlora.transfer.models.find import find_model
from fastlora.transfer.recommend import Recommendation, recommend_strategy
from fastlora.transfer.strategies import Strategy, find_strategy
from fastlora.transfer.training.checks import several_examples
from fastlora.transfer.training.randomness import seeded
from fastlora.transfer.training.settings import TrainSettings
from fastlora.transfer.unfreezing import GradualUnfreezing, all_unfrozen


@dataclass(frozen=True)
class Job:
    """A run that can begin.

    Attributes:
        model: The model, in which what the strategy wants trains.
        head: The model's classifier.
        strategy: The strategy that was asked for, or that is advised.
        recommendation: What is advised for these data.
        train: Pictures to train on, with the training transform.
        validation: Pictures to watch, with the evaluation transform.
        test: Pictures to judge the result with, with the evaluation transform; None if there are none.
        training: How to train, with the strategy's rates filled in.
        unfreezing: When stages begin to train, if they do so later.
    """

    model: nn.Module
    head: nn.Module
    strategy: Strategy
    recommendation: Recommendation
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages | None
    training: TrainSettings
    unfreezing: GradualUnfreezing | None

    def parameters(self) -> ParameterReport:
        """What trains and what a batch's part of it keeps in memory, without computing anything."""
        picture = self.validation[0][0]
        size = min(-(-self.training.batch_size // self.training.accumulation), len(self.train))
        # the most that ever trains is what has to fit
        with all_unfrozen(self.model, self.head, self.unfreezing), several_examples():
            return parameter_report(self.model.train(), sample_input=torch.zeros(size, *picture.shape))


def prepare(
    settings: FinetuneSettings,
    training: TrainSettings,
    reporter: Reporter,
    images: Any = None,
    test_images: Any = None,
) -> Job:
    """Open the pictures, build the model and fill in what is left to us.

    Args:
        settings: What to fine-tune, and on what.
        training: How to train; rates that it leaves out are the strategy's.
        reporter: Is told about the progress.
        images: Instead of ``settings.data``: anything that ``open_images`` takes.
        test_images: Instead of ``settings.test``: anything that ``open_images`` takes.

    Raises:
        ValueError: Pictures, model, strategy or an option that don't fit; see
            :func:`fastlora.create_transfer_model` and ``open_images``.
        FileNotFoundError: There are no such files.
    """
    make = find_model(
        settings.model, settings.model_weights(), hidden=settings.hidden, **settings.model_options()
    )
    given = None if settings.strategy is None else _strategy(settings.strategy, settings)
    train, validation, test = _open(settings, (images, test_images), training.seed, reporter)
    with seeded(training.seed):
        model, head_name = make(len(train.classes))
        recommendation = _recommend(model, train)
        # nothing else can be trained on cached features
        advised = "feature_extraction" if settings.cache_features else recommendation.strategy
        strategy = given or _strategy(advised, settings)
        if settings.image_size is not None:
            check_takes(model.eval(), settings.image_size)
        strategy.apply_to(model, head_name, **settings.options())
    head = model.get_submodule(head_name)
    augmented, plain = pretrained_transforms(
        settings.model, image_size=settings.image_size, weights=settings.weights, flip=settings.flip
    )
    return Job(
        model.train(),
        head,
        strategy,
        recommendation,
        train.with_transform(plain if settings.cache_features else augmented),
        validation.with_transform(plain),
        None if test is None else test.with_transform(plain),
        _with_rates(training, settings, strategy),
        _unfreezing(strategy, model, head, training.epochs, settings.train_batch_norm),
    )


def _strategy(name: str, settings: FinetuneSettings) -> Strategy:
    """A strategy by its name, once its options are checked."""
    strategy = find_strategy(name)
    try:
        strategy.check_options(settings.options())
    except TypeError as error:
        raise ValueError(str(error)) from error
    if settings.cache_features and strategy.name != "feature_extraction":
        raise ValueError(
            f"expected strategy feature_extraction with cache_features, got {strategy.name!r}; "
            "only frozen features stay the same"
        )
    return strategy


def _open(
    settings: FinetuneSettings, given: tuple[Any, Any], seed: int, reporter: Reporter
) -> tuple[LabelledImages, LabelledImages, LabelledImages | None]:
    columns = {"image_column": settings.image_column, "label_column": settings.label_column}

    def checked(found: LabelledImages) -> LabelledImages:
        told = _told(reporter, "check pictures")
        return readable(found, on_corrupt=settings.on_corrupt, on_done=told)

    def set_apart(source: Any, part: str) -> LabelledImages:
        images = checked(open_images(source, **columns).with_classes(train.classes))
        tell_overlap(train, images, part)
        return images

    data, test = (
        name if own is None else own for name, own in zip((settings.data, settings.test), given, strict=True)
    )
    train, validation = open_parts(data, **columns)
    train = checked(train)
    tell_copies(train)
    watched: Any = validation if settings.validation is None else settings.validation
    if watched is None:
        shares = [1 - settings.validation_share, settings.validation_share]
        parts = stratified_split(train.labels, shares, seed=seed, groups=train.digests, classes=train.classes)
        learnt, held_out = (train.subset(part) for part in parts)
    else:
        learnt, held_out = train, set_apart(watched, "validation")
    return learnt, held_out, None if test is None else set_apart(test, "testing")


def _told(reporter: Reporter, task: str) -> Callable[[int, int], None]:
    return lambda done, total: reporter.advance(task, done, total, None)


def _recommend(model: nn.Module, train: LabelledImages) -> Recommendation:
    size = sum(parameter.numel() for parameter in model.parameters())
    return recommend_strategy(
        len(train),
        len(train.classes),
        total_parameters=size,
        transformer=bool(find_blocks(dict(model.named_modules()))),
    )


def _with_rates(training: TrainSettings, settings: FinetuneSettings, strategy: Strategy) -> TrainSettings:
    lr = strategy.lr if settings.lr is None else settings.lr
    factor = strategy.head_factor if settings.head_factor is None else settings.head_factor
    return replace(training, lr=lr, head_factor=factor)


def _unfreezing(
    strategy: Strategy, model: nn.Module, head: nn.Module, epochs: int, train_batch_norm: bool | None
) -> GradualUnfreezing | None:
    if strategy.unfreezing is None:
        return None
    plan = strategy.unfreezing(len(stages(model, head)), epochs)
    return replace(plan, train_batch_norm=bool(train_batch_norm))
