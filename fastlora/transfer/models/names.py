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
        name: Of a classification model of torchvision, one of :data:`PACKAGED`, or ``timm:`` and a name of
            timm's.
        *more: Other names to accept.

    Raises:
        ValueError: There is no such model; near names are listed.
        ImportError: It is timm's, and timm is not installed.
    """
    if str(name).startswith(TIMM_PREFIX):
        _check_timm(name)
        return
    # slow to import
    from torchvision import models

    own = (*PACKAGED, *more)
    known = [*models.list_models(module=models), *own]
    if name not in known:
        advice = did_you_mean(str(name).lower(), known, count=4, cutoff=0.4)
        raise ValueError(
            f"{advice}expected a classification model of torchvision, {', '.join(own)} or {TIMM_PREFIX}NAME, "
            f"got {name!r}"
        )


def timm_of(name: str) -> tuple[Any, str]:
    """The library timm, and what it calls a model that begins with :data:`TIMM_PREFIX`.

    Raises:
        ImportError: It is not installed.
    """
    timm = require("timm", distribution="timm", purpose=f"the model {name}", extra="timm")
    return timm, name.removeprefix(TIMM_PREFIX)


def _check_timm(name: str) -> None:
    timm, own = timm_of(name)
    if not timm.is_model(own):
        names = [TIMM_PREFIX + each for each in timm.list_models()]
        advice = did_you_mean(name, names, count=4, cutoff=0.4)
        raise ValueError(f"{advice}expected the name of a model of timm, got {own!r}")
