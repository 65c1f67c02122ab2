"""Two processes with measured choices of their own: after sharing, both have the first's. Run by torchrun."""

import torch.distributed as dist

import fastlora.tuning
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.tuned import Choice
from tests.launching import leave
from tests.tuning_models import GPU, record, shared_record


def main() -> None:
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    shared = shared_record(Choice("shared"), Choice("epilogue"))
    tuned.pin(GPU, [record(path="single"), shared] if first else [record(path="library")])
    if not first:
        tuned.pin("another-card-8", [record()])
    fastlora.tuning.share()
    assert tuned.pinned(GPU) == [record(path="single"), shared]
    assert tuned.pinned("another-card-8") == []
    leave()


if __name__ == "__main__":
    main()
