"""Every launch as a GPU would get it, on a machine without one; ``stage.py`` says how."""

import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="launches need Triton")

from fastlora_kernels import launch, targets
from fastlora_kernels.choose.plan import KERNELS
from fastlora_kernels.quant.kernels import DECODING
from tests.cases import cases
from tests.compiling import told_by
from tests.launch.parameters import MAP_BYTES, Problem, check_parameters, expected_parameters

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or sys.platform != "linux",
    reason="Triton's launcher is built with gcc on Linux",
)

# what the stage says of each wrong launch
REFUSED = {
    "no device guard": "outside of the device guard",
    "another stream": "outside of the device guard",
    "a grid too tall": "grid",
    "too much shared memory": "shared memory",
    "an unaligned address": "partial_ptr that 16 divides",
    "an odd size": "SIZE that 16 divides",
    "another constant": "compiled for BLOCK = 1024",
    "an argument too few": "4 arguments for 5 names",
    "a wait for the GPU": "_local_scalar_dense",
}
REFUSED_BY_CUDA = {
    "pointers swapped": "partial_ptr arrives as",
    "another size": "SIZE arrives as",
    "another grid": "grid, threads and stream arrive as",
    "no launch": "nothing arrived",
    "too many threads": "threads of",
    "another architecture": "a cubin for",
}
REFUSED_MAPS = {
    "a map's address": "no multiple of 16",
    "a map's stride": "a stride of 1032 bytes",
    "a map's box": "a box of 300",
    "a map's inner box": "swizzled by 128",
    "a map's rows overlapping": "rows overlap",
}
HAVE_MAPS = ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
# every kernel of a layer with a few tiles, for sizes that 16 divides and for others
MOST_COMPILED = 32


# the others launch what these do: python -m tests.launch.run --target sm_89
@pytest.fixture(scope="module", params=cases(["sm_90"], ["sm_80", "sm_100", "sm_120", "gfx942"]))
def told(request: pytest.FixtureRequest, kept_folder: Callable[[str], Path]) -> dict[str, Any]:
    """What ``run.py`` tells of a target; of Hopper every case where every test runs, and else a few."""
    target, every = request.param, request.config.getoption("markexpr") == ""
    suite = "quick" if target != "sm_90" else "full" if every else "few"
    cache = str(kept_folder("launch"))
    command = ("tests.launch.run", "--target", target, "--suite", suite, "--cache", cache)
    return {**told_by(*command), "target": target}


def test_every_launch_is_sound(told: dict[str, Any]) -> None:
    assert told["failures"] == {}


def test_no_tensor_of_a_call_is_kept(told: dict[str, Any]) -> None:
    assert told["kept"] == 0


def test_no_op_waits_for_the_gpu(told: dict[str, Any]) -> None:
    assert told["waits"] == []


def test_every_kernel_is_launched(told: dict[str, Any]) -> None:
    launched = {kernel for kernels in told["launched"].values() for kernel in kernels}
    wanted = {kernel.function[1] for kernel in KERNELS}
    if told["target"] in ("sm_90", "sm_100", "sm_103"):
        wanted |= {kernel.persistent[1] for kernel in KERNELS if kernel.persistent}
    if told["target"] not in targets.TARGETS:
        # nothing is known of the card: its plans leave all but split to the library
        wanted -= {"_lora_forward_single_kernel", "_lora_add_kernel"}
        wanted -= {kernel.function[1] for kernel in DECODING.values()}
    assert wanted - launched == set()


def test_other_sizes_and_settings_compile_nothing_new(told: dict[str, Any]) -> None:
    """Forty batch sizes, then forty others, then other dropouts."""
    compilations = told["compilations"]
    assert compilations.pop("first pass") <= MOST_COMPILED
    assert compilations == {"second pass": 0, "other dropouts": 0}


def test_the_stage_refuses_what_a_gpu_would(told: dict[str, Any]) -> None:
    said, target = told["refusals"], told["target"]
    wanted = REFUSED | ({} if target == "gfx942" else REFUSED_BY_CUDA)
    if target == "sm_75":
        # nothing is copied ahead before Ampere: eight stages take no more than one
        assert said["too much shared memory"] == "accepted"
        wanted.pop("too much shared memory")
    wanted |= REFUSED_MAPS if target in HAVE_MAPS else {}
    assert {what: words for what, words in wanted.items() if words not in said[what]} == {}
    sound = {"nothing wrong", "a sound map", *({"too much shared memory"} - wanted.keys())}
    assert {what for what, words in said.items() if words == "accepted"} <= sound
    assert said.keys() - wanted.keys() <= sound


@pytest.mark.parametrize(("version", "given"), [("3.8", [(8, 9)]), ("3.6", [8, 9]), ("3.10", None)])
def test_launchers_that_are_not_known_are_left_to_triton(
    version: str, given: list[Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, tuple[Any, ...]] = {}

    class Launcher:
        __module__ = "triton.backends.nvidia.driver"
        launch_cooperative_grid = launch_pdl = False
        arg_annotations = kernel_signature = b""

        def launch(self, *arguments: Any) -> None:
            calls["in C"] = arguments

        def __call__(self, *arguments: Any) -> None:
            calls["wrapper"] = arguments

    monkeypatch.setattr(launch, "_TRITON", version)
    compiled = SimpleNamespace(run=Launcher(), function=5, packed_metadata=(4, 1))
    launch._runner(compiled, (1, 2, 3))(7, (8, 9))
    if given is None:
        assert calls == {"wrapper": (1, 2, 3, 7, 5, (4, 1), None, None, None, 8, 9)}
    else:
        assert calls.keys() == {"in C"}
        assert list(calls["in C"][:5]) == [1, 2, 3, 7, 5]
        assert list(calls["in C"][-len(given) :]) == given


def test_a_map_that_loses_a_bit_is_noticed() -> None:
    """So it is packed for tensors beyond 2 GiB by Triton 3.7 and 3.8."""
    large = SimpleNamespace(
        base=torch.empty(512, 512, dtype=torch.bfloat16), shape=[512, 512], strides=[512, 1]
    )
    source = SimpleNamespace(signature={"y_desc": "tensordesc<bf16[64,64]>"})
    expected = list(expected_parameters(source.signature, (large,)))
    # and two for scratch memory
    arrived = [each.start.ljust(each.size, b"\0") for each in expected] + [bytes(8), bytes(8)]
    check_parameters(source, (large,), arrived)
    (word,) = struct.unpack_from("<Q", arrived[0], 8)
    arrived[0] = arrived[0][:8] + struct.pack("<Q", word & ~(1 << 21)) + arrived[0][16:]
    assert len(arrived[0]) == MAP_BYTES
    with pytest.raises(Problem, match=r"the tensor of y_desc for a small one.*2 GiB"):
        check_parameters(source, (large,), arrived)
