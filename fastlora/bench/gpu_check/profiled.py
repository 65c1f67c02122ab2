"""What each kernel of a step takes on the GPU, told by torch's profiler."""

from collections.abc import Callable, Iterator

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastlora.bench.gpu_check.items import Found, Item
from fastlora.bench.turns import Step

# in one profile: of a single call, the first would count most
_CALLS = 10


def profile_item(case: str, make: Callable[[], Step]) -> Item:
    """A profile as an item of its own: a profiler may slow down all that its process does after it.

    Args:
        case: Name of what is profiled.
        make: Makes the step.
    """

    def work() -> Iterator[Found]:
        step = make()
        step()
        yield {"profile": {"case": case, "kernel_us": kernel_us(step)}}

    return Item(f"profile: {case}", work)


def kernel_us(step: Step) -> dict[str, float]:
    """Microseconds of GPU time that one call of a step spends in each kernel, the longest first.

    Empty where the profiler sees no kernels, as without access to the GPU's counters.

    Args:
        step: What is profiled; everything that it launches was launched before.
    """
    torch.cuda.synchronize()
    # without the CPU's side, torch refuses where there is no GPU
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as measured:
        for _ in range(_CALLS):
            step()
        torch.cuda.synchronize()
    spent = {
        each.key: each.self_device_time_total / _CALLS
        for each in measured.key_averages()
        if each.device_type == DeviceType.CUDA
    }
    return dict(sorted(spent.items(), key=lambda pair: -pair[1]))
