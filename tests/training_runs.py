"""A small classifier with everything that holds state, its pictures, and runs of it that are killed."""

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.transfer.data import LabelledImages
from fastlora.transfer.models.freezing import freeze_stages
from fastlora.transfer.training import Trainer, TrainResult, TrainSettings
from fastlora.transfer.unfreezing import GradualUnfreezing

COUNT, CLASSES = 22, ("dark", "light")
_PIXELS = torch.rand(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(3))
_LABELS = tuple(int(index % 3 == 0) for index in range(COUNT))


class Noise:
    """An augmentation that draws from torch's generator."""

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels + 0.1 * torch.randn_like(pixels)

    def __repr__(self) -> str:
        return "Noise()"


@dataclass(frozen=True)
class Pixels:
    def __call__(self, index: int) -> Tensor:
        return _PIXELS[index] + 0.3 * _LABELS[index]


def pictures(transform: Any = None) -> LabelledImages:
    names = tuple(f"{index}.png" for index in range(COUNT))
    return LabelledImages(CLASSES, _LABELS, names, Pixels(), transform)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs) if batch_norm else nn.GroupNorm(2, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.norm(self.conv1(x)).relu())
        return y


class Net(nn.Module):
    def __init__(self, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Block(*widths, batch_norm) for widths in ((3, 4), (4, 4), (4, 6))))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.dropout(self.layers(x).mean((2, 3))))
        return y


def make_net(*, trained_stages: int = 3, dropout: float = 0.3, batch_norm: bool = True, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net(dropout, batch_norm)
    freeze_stages(net, net.head, trained_stages)
    return net


SETTINGS = TrainSettings(
    epochs=3, batch_size=8, lr=0.02, accumulation=2, ema=0.9, mixup=0.3, label_smoothing=0.1
)
# what each run adds to the settings above, and when its stages begin to train
RUNS: dict[str, tuple[dict[str, Any], GradualUnfreezing | None]] = {
    "epochs": ({}, None),
    "mid-epoch": ({"checkpoint_every": 2, "class_weights": True}, None),
    "unfreezing": ({"checkpoint_every": 2, "restore_best": False}, GradualUnfreezing((2, 4, 7), "step")),
    "one-cycle": ({"schedule": "one_cycle", "optimizer": "sgd", "checkpoint_every": 1, "ema": None}, None),
    "two domains": ({"mixup": 0.0, "checkpoint_every": 2}, None),
    "early stop": ({"checkpoint_every": 4, "patience": 1, "lr": 1e-6, "monitor": "accuracy"}, None),
}


class Killer:
    """Kills its process after an optimiser step."""

    number = signal.SIGKILL

    def __init__(self, step: int | None) -> None:
        self._step = step

    def note(self, text: str) -> None:
        """Nobody listens."""

    def advance(
        self, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        if done == self._step:
            os.kill(os.getpid(), self.number)


def make_trainer(name: str, output: Path, *, reporter: Any = None, **changes: Any) -> Trainer:
    more, unfreezing = RUNS[name]
    net = make_net(trained_stages=0 if unfreezing else 3)
    settings = replace(SETTINGS, **{**more, **changes})
    if name == "two domains":
        from tests.domain_runs import make_domain_trainer

        return make_domain_trainer(net, settings, output, reporter=reporter)
    return Trainer(
        net, pictures(Noise()), pictures(), settings, output=output, unfreezing=unfreezing, reporter=reporter
    )


def run(name: str, output: Path, *, kill_at: int | None = None, resume: bool = False) -> TrainResult:
    trainer = make_trainer(name, output, reporter=Killer(kill_at))
    result = trainer.fit(resume=resume)
    torch.save(trainer.model.state_dict(), output / "model.pt")
    return result


def _in_child(name: str, output: Path, **how: Any) -> int:
    # the parent has used no thread yet, so a copy of it can compute
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(name, output, **how)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(name: str, folder: Path) -> None:
    """Run once undisturbed, then again and again, killed at every step in turn and resumed."""
    torch.set_num_threads(1)
    # imports once for all children
    make_trainer(name, folder / "unused")
    assert _in_child(name, folder / "whole") == 0
    steps = len((folder / "whole" / "steps.csv").read_text().splitlines()) - 1
    for step in range(1, steps + 1):
        output = folder / f"killed-{step}"
        assert _in_child(name, output, kill_at=step) == -signal.SIGKILL
        assert _in_child(name, output, resume=True) == 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
