"""Two processes with measured choices of their own: after sharing, both have the first's. Run by torchrun."""

import torch.distributed as dist

import fastlora.tuning
from fastlora_kernels import tuned
from tests.tuning_models import record


def main() -> None:
    dist.init_process_group("gloo")
    try:
        tuned.pin([record(path="single" if dist.get_rank() == 0 else "library")])
        fastlora.tuning.share()
        assert [each.forward.path for each in tuned.pinned()] == ["single"]
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
