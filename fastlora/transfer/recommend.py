"""Which strategy fits: advice with its reason."""

from dataclasses import dataclass
from typing import Literal

# below, a strategy with millions of free parameters has too little to hold on to
_FEW = 200
_FEW_PER_CLASS = 10
_MANY = 20_000
# full fine-tuning with AdamW in fp32 holds 16 bytes a parameter beside the activations
_BYTES_PER_PARAMETER = 16
_LARGE_MODEL = 500_000_000

_VTAB = "VTAB-1k, ViT-B/16: full 69.0, prompts 72.0, adapters 73.9, LoRA 74.5 (means of 19 tasks)"
_LP_FT = (
    "Kumar et al. 2022, arXiv 2202.10054: probe then fine-tune is 1 % better in and 10 % better out of "
    "distribution than full fine-tuning"
)
_KORNBLITH = "Kornblith et al. 2019, arXiv 1805.08974: fine-tuning wins over fixed features as data grows"
_GANIN = "Ganin et al. 2016, JMLR 17(59)"

Domain = Literal["near", "far", "unknown"]


@dataclass(frozen=True)
class Recommendation:
    """Advice how to adapt a model.

    Attributes:
        strategy: A name that :func:`fastlora.create_transfer_model` takes, or ``"domain_adaptation"``.
        reason: Why, in words and with the numbers it rests on.
        sources: Papers and tables behind it.
        alternatives: Names of strategies to try beside it.
    """

    strategy: str
    reason: str
    sources: tuple[str, ...]
    alternatives: tuple[str, ...]


def recommend_strategy(
    num_examples: int,
    num_classes: int,
    *,
    total_parameters: int | None = None,
    transformer: bool = True,
    domain: Domain = "unknown",
    target_is_unlabelled: bool = False,
) -> Recommendation:
    """Advise how to adapt a pretrained model; rules of thumb, not measurements on your data.

    The usual table (little data: features; medium: last layers; large: everything; another unlabelled
    domain: adaptation), with adapters and LoRA where they are known to do better than last layers.

    Args:
        num_examples: Number of labelled training examples.
        num_classes: Number of classes among them.
        total_parameters: Number of the model's parameters; None if unknown.
        transformer: Whether the model is made of transformer blocks, which LoRA and adapters fit best.
        domain: How far the pictures are from what the model was pretrained on.
        target_is_unlabelled: The labels are of one domain, the model is for another.

    Raises:
        ValueError: No examples, fewer than two classes, or an unknown domain.

    Example:
        >>> recommend_strategy(120, 5).strategy, recommend_strategy(2000, 5).strategy
        ('feature_extraction', 'lora')
    """
    if num_examples < 1 or num_classes < 2:
        raise ValueError(
            f"expected at least one example and two classes, got {num_examples} and {num_classes}"
        )
    if domain not in ("near", "far", "unknown"):
        raise ValueError(f"expected domain as 'near', 'far' or 'unknown', got {domain!r}")
    if target_is_unlabelled:
        return _adaptation()
    if num_examples < _FEW or num_examples / num_classes < _FEW_PER_CLASS:
        return _few(num_examples, num_classes)
    if total_parameters is not None and total_parameters >= _LARGE_MODEL:
        return _large_model(total_parameters)
    if num_examples < _MANY:
        return _medium(num_examples, transformer, domain)
    return _many(num_examples, domain)


def _adaptation() -> Recommendation:
    return Recommendation(
        "domain_adaptation",
        "The labels are of another domain than the one the model is for, which has none: train on both, so "
        "that features tell the classes but not the domains apart. It can hurt, so compare with a probe.",
        (_GANIN,),
        ("feature_extraction",),
    )


def _few(num_examples: int, num_classes: int) -> Recommendation:
    return Recommendation(
        "feature_extraction",
        f"{num_examples:,} examples, {num_examples / num_classes:.3g} a class, are few (below {_FEW} or "
        f"{_FEW_PER_CLASS} a class): only a linear head is not too large for them.",
        (_KORNBLITH,),
        ("prompt", "lora"),
    )


def _large_model(total_parameters: int) -> Recommendation:
    gib = total_parameters * _BYTES_PER_PARAMETER / 2**30
    return Recommendation(
        "lora",
        f"{total_parameters:,} parameters would take {gib:,.1f} GiB for weights, gradients and AdamW's state "
        "in fp32 to train whole; LoRA holds gradients and state of its own small matrices only.",
        ("Hu et al. 2021, arXiv 2106.09685", _VTAB),
        ("adapter", "feature_extraction"),
    )


def _medium(num_examples: int, transformer: bool, domain: Domain) -> Recommendation:
    if transformer:
        return Recommendation(
            "lora",
            f"{num_examples:,} examples are enough to move the features and too few to move every weight; "
            "on transformers LoRA and adapters then beat both last layers and full fine-tuning.",
            (_VTAB,),
            ("adapter", "lp_ft" if domain == "far" else "fine_tuning"),
        )
    if domain == "far":
        return Recommendation(
            "lp_ft",
            f"{num_examples:,} examples of a far domain need other features than the last stage's alone; "
            "training the head first keeps what the early layers know.",
            (_LP_FT,),
            ("gradual", "fine_tuning"),
        )
    return Recommendation(
        "fine_tuning",
        f"{num_examples:,} examples of a medium-sized set: the last stage is special to the old task, the "
        "early ones are not and stay frozen.",
        (_KORNBLITH,),
        ("lp_ft", "feature_extraction"),
    )


def _many(num_examples: int, domain: Domain) -> Recommendation:
    return Recommendation(
        "full" if domain == "far" else "lp_ft",
        f"{num_examples:,} examples can carry training every weight"
        + (
            ", and a far domain wants it."
            if domain == "far"
            else "; the head first, so that its random start does not spoil features that already fit."
        ),
        (_KORNBLITH, _LP_FT),
        ("lora", "lp_ft" if domain == "far" else "full"),
    )
