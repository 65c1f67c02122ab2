"""Models by name: torchvision's, timm's, and those whose weights come in ordinary packages."""

from typing import Any

from fastlora._core.extras import require
from fastlora._core.words import did_you_mean

TIMM_PREFIX = "timm:"
DINOV2 = "dinov2_vits14"
EFFICIENTNET_LITE0 = "efficientnet_lite0"
# their weights come with a package, always
PACKAGED = (DINOV2, EFFICIENTNET_LITE0)


def check_name(name: str, *more: str) -> None:
    """Refuse a name that no model has, without making one.

    Args:
        name: A classification model of torchvision, one of :data:`PACKAGED`, or ``timm:`` and a name of
            timm's.
        *more: Other names to accept.

    Raises:
        ValueError: There is no such model; near names are listed.
        ImportError: It is timm's, and timm is not installed.
    """
    if str(name).startswith(TIMM_PREFIX):
        timm, own = timm_of(name)
        if timm.is_model(own):
            return
        known, expected = [TIMM_PREFIX + each for each in timm.list_models()], "the name of a model of timm"
    else:
        # slow to import
        from torchvision import models

        others = (*PACKAGED, *more)
        known, own = [*models.list_models(module=models), *others], name
        if name in known:
            return
        expected = f"a classification model of torchvision, {', '.join(others)} or {TIMM_PREFIX}NAME"
    advice = did_you_mean(str(name).lower(), known, count=4, cutoff=0.4)
    raise ValueError(f"{advice}expected {expected}, got {own!r}")


def timm_of(name: str) -> tuple[Any, str]:
    """The library timm, and what it calls a model.

    Args:
        name: :data:`TIMM_PREFIX` and the model's name in timm.

    Raises:
        ImportError: It is not installed.
    """
    timm = require("timm", distribution="timm", purpose=f"the model {name}", extra="timm")
    return timm, name.removeprefix(TIMM_PREFIX)
