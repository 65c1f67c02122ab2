"""Settings of the demo on each data set."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastlora.transfer.fit import FitSettings
from fastlora.transfer.methods import adapter_tuning, full_tuning, lora_tuning, prompt_tuning
from fastlora.transfer.tuning import Tuning


@dataclass(frozen=True)
class Recipe:
    """Settings of the demo on one data set.

    ELPV's for the probe and LoRA were chosen on validation pictures; the other methods' are first choices.

    Attributes:
        image_size: Height and width in pixels.
        train: Number of pictures to train on.
        validation: Number of pictures to watch; the rest is for the test.
        probe: How the probe's linear layer is trained.
        tunings: The other methods by name.
        eager_epochs: How many epochs of LoRA to repeat with the eager formula.
    """

    image_size: int
    train: int
    validation: int
    probe: FitSettings
    tunings: Mapping[str, Tuning]
    eager_epochs: int = 2

    def limited(self, epochs: int | None, max_steps: int | None) -> "Recipe":
        """With this many epochs of all but the probe, and at most so many optimiser steps for each method."""
        tunings = {name: tuning.limited(epochs, max_steps) for name, tuning in self.tunings.items()}
        return replace(self, tunings=tunings, probe=replace(self.probe, max_steps=max_steps))

    def usable_pictures(self) -> int:
        """Training pictures that the steps can reach; features of more would only cost time."""
        fits = [self.probe, *(tuning.fit for tuning in self.tunings.values())]
        reach = [fit.max_steps * fit.batch_size for fit in fits if fit.max_steps is not None]
        return min(self.train, max(reach, default=self.train))


def _tunings(epochs: int) -> dict[str, Tuning]:
    def fit(learning_rate: float, head_factor: float) -> FitSettings:
        return FitSettings(epochs, 16, learning_rate, head_factor=head_factor)

    return {
        "lora": lora_tuning(fit(5e-4, 10.0), rank=8, alpha=16.0),
        "adapter": adapter_tuning(fit(1e-3, 5.0), adapter_size=64),
        "prompts": prompt_tuning(fit(1e-2, 0.5), num_tokens=10),
        # the pretrained weights only need a nudge, the head has everything to learn
        "full": full_tuning(fit(3e-5, 100.0)),
    }


_PROBE = FitSettings(epochs=100, batch_size=32, learning_rate=3e-3, weight_decay=1e-4)

RECIPES = {
    "elpv": Recipe(image_size=112, train=540, validation=120, probe=_PROBE, tunings=_tunings(epochs=6)),
    "mnist5k": Recipe(image_size=56, train=1500, validation=500, probe=_PROBE, tunings=_tunings(epochs=3)),
}
