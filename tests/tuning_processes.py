"""Two processes with measured choices of their own: after sharing, both have the first's. Run by torchrun."""

import torch.distributed as dist

import fastlora.tuning
from fastlora_kernels import tuned
from tests.launching import leave
from tests.tuning_models import record


def main() -> None:
    dist.init_process_group("gloo")
    tuned.pin([record(path="single" if dist.get_rank() == 0 else "library")])
    fastlora.tuning.share()
    assert [each.forward.path for each in tuned.pinned()] == ["single"]
    leave()


if __name__ == "__main__":
    main()
