"""Fixtures for every test."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from tests.cases import cases

if TYPE_CHECKING:
    from tests.kernel_harness import Harness

if not torch.cuda.is_available():
    # read when the kernels are decorated, so it has to stand before their first import
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # the workers and what they start share the cores
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on a GPU where there is one, so that ``-m gpu`` takes it."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        chosen = callspec is not None and callspec.params.get("backend") == "triton"
        if chosen or "kernel_device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Tests draw from torch's generator; none depends on which others ran before it."""
    torch.manual_seed(0)
    # a test may put other functions in the place of those that were prepared
    from fastlora.ops.prepared import Memory

    Memory.forget_all()
    precision = torch.get_float32_matmul_precision()
    yield
    # torchao lowers it for the whole process where it quantises
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=["accelerate", "apply_lora"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of ``sibling_models`` by both ways to put LoRA in: PEFT's layers, and our own."""
    # imported late: most tests need no PEFT
    from tests import sibling_models

    monkeypatch.setattr(sibling_models, "way", sibling_models.WAYS[request.param])


@pytest.fixture(scope="session")
def kept_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Makes folders, by name, that pytest keeps from run to run; new ones where its cache is switched off."""
    kept = getattr(request.config, "cache", None)
    return kept.mkdir if kept else tmp_path_factory.mktemp


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where the kernels run: a GPU, or the CPU through Triton's interpreter, which then learns bf16."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    from tests.interpreter_bf16 import teach_interpreter_bf16

    teach_interpreter_bf16()
    return torch.device("cpu")


# the large tiles of real GPUs are tried in fp16
@pytest.fixture(params=cases(["fp32", "bf16"], ["fp16"]))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype the kernels serve."""
    from tests.lora_yardstick import DTYPES

    return DTYPES[request.param]


@pytest.fixture
def harness(dtype: torch.dtype, kernel_device: torch.device) -> "Iterator[Harness]":
    """A kernel harness for each dtype; nothing may have been written into its margins."""
    # imports fastlora, which must not happen before the interpreter is on
    from tests.kernel_harness import Harness

    made = Harness(dtype, kernel_device)
    yield made
    made.assert_margins_untouched()
