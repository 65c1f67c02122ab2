"""A run for several processes, started by a launcher: ``OUTPUT SHARDING [KILL_AT]``."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastlora.transfer.training import Trainer
from tests.launching import leave
from tests.training_runs import SETTINGS, Killer, Noise, make_net, pictures

# without what depends on who computes what: batch statistics, dropout (drawn in each process), 16 bits
SETTINGS = replace(SETTINGS, accumulation=1, checkpoint_every=2, precision="no")


def main(output: Path, sharding: Any, kill_at: int | None = None) -> None:
    torch.set_num_threads(1)
    net = make_net(dropout=0.0, batch_norm=False, trained_stages=2)
    settings = replace(SETTINGS, sharding=sharding)
    trainer = Trainer(net, pictures(Noise()), pictures(), settings, output=output, reporter=Killer(kill_at))
    trainer.fit(resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
    leave()
