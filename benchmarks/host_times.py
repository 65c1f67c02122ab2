"""What a layer costs the host of a GPU: microseconds of Python and of Triton's launcher, without a GPU.

The ops run as on an H100, launches included, up to the driver, which is the tests' stand-in
(``tests/launch``) and does nothing. Matrices are tiny, so that a library product
takes a CPU about what its launch takes a GPU's host. A layer whose GPU work is shorter waits for the host.

    python -m benchmarks.host_times --json host_times.json
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

import fastlora
from fastlora._core.environment import processor
from fastlora.tuning.calls import LayerCall
from fastlora_kernels.choose.tuned import Choice
from tests.launch.calls import measured
from tests.launch.cards import CARDS
from tests.launch.stage import DEVICE, Stage

SIZE, RANK = 64, 16
REPEATS, WARM_UP = 1000, 40


def fastest_us(work: Callable[[], object]) -> float:
    """Where the fastest tenth of a call's times ends: whatever else the machine does only lengthens them."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter_ns()
        work()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return sorted(times)[REPEATS // 10]


class Passes:
    """Times both passes of layers on one input.

    Args:
        stage: The GPU, whose launches are counted.
    """

    def __init__(self, stage: Stage) -> None:
        """See the class."""
        self._stage = stage
        self.rows: dict[str, dict[str, float]] = {}

    def add(self, name: str, layer: Callable[[Tensor], Tensor], trained: Sequence[Tensor]) -> None:
        """Time a layer.

        Args:
            name: What the row is called.
            layer: Called with x ``[64, 64]``.
            trained: What wants a gradient beside x.
        """
        x = torch.zeros(SIZE, SIZE, requires_grad=True)
        dy = torch.zeros_like(layer(x))

        def step() -> object:
            return torch.autograd.grad(layer(x), [x, *trained], dy)

        step()
        before = self._stage.library.stand_in_launches()
        step()
        launches = self._stage.library.stand_in_launches() - before
        forward, both = fastest_us(lambda: layer(x)), fastest_us(step)
        self.rows[name] = {"forward": round(forward), "backward": round(both - forward), "launches": launches}

    def add_calls(self, name: str, forward: Callable[[], object], backward: Callable[[], object]) -> None:
        """Time two passes that are called by themselves."""
        before = self._stage.library.stand_in_launches()
        times = {}
        for pass_name, work in (("forward", forward), ("backward", backward)):
            work()
            times[pass_name] = round(fastest_us(work))
        calls = 2 * (1 + WARM_UP + REPEATS)
        launches = (self._stage.library.stand_in_launches() - before) * 2 // calls
        self.rows[name] = {**times, "launches": launches}


def time_layers(stage: Stage) -> dict[str, dict[str, float]]:
    """Microseconds of every kind of layer by pass, and how often it launches a kernel of ours."""
    passes, call = Passes(stage), partial(LayerCall, SIZE, SIZE, SIZE, RANK, dtype="float32")
    base = torch.nn.Linear(SIZE, SIZE).requires_grad_(False)
    passes.add("frozen layer", base, [])
    a, b = torch.zeros(RANK, SIZE, requires_grad=True), torch.zeros(SIZE, RANK, requires_grad=True)

    def eager(x: Tensor, *, p: float) -> Tensor:
        return base(x) + F.linear(F.linear(F.dropout(x, p) if p else x, a), b) * 2.0  # type: ignore[no-any-return]

    for p in (0.0, 0.1):
        passes.add(f"eager LoRA, p = {p}", partial(eager, p=p), [a, b])
    for p in (0.0, 0.1):
        layer = fastlora.LoRALinear(SIZE, SIZE, rank=RANK, dropout=p)
        trained = [layer.lora_A, layer.lora_B]
        # one launch draws no mask, and has no backward pass of its own
        for path in ("split", "epilogue") if p else ("split", "single", "epilogue"):
            backward = Choice("split" if path == "single" else path)
            with measured(call(dropout=p), Choice(path), backward), fastlora.use_backend("triton"):
                passes.add(f"{path}, p = {p}", layer, trained)
        with fastlora.use_backend("torch"):
            passes.add(f"torch backend, p = {p}", layer, trained)
    dora = fastlora.LoRALinear(SIZE, SIZE, rank=RANK, dropout=0.1, dora=True)
    adapter = fastlora.AdapterLayer(SIZE, RANK)
    for name, backend in (("eager ", "reference"), ("", "triton")):
        with fastlora.use_backend(backend):
            trained = [each for each in dora.parameters() if each.requires_grad]
            passes.add(f"{name}DoRA, p = 0.1", dora, trained)
            passes.add(f"{name}adapter", adapter, list(adapter.parameters()))
    return passes.rows


def time_graph_calls(stage: Stage) -> dict[str, dict[str, float]]:
    """Microseconds of what a compiled graph of the layer calls: our two ops, or eager's products.

    A graph's own Python is left out, and of eager's graph what joins the products, mask included.
    """
    passes = Passes(stage)
    x, w, bias = torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE), torch.zeros(SIZE)
    a, b, s, y = (torch.zeros(shape) for shape in ((RANK, SIZE), (SIZE, RANK), (SIZE, RANK), (SIZE, SIZE)))

    def forward() -> None:
        base = torch.addmm(bias, x, w.t(), out=torch.empty_like(y))
        torch.addmm(base, torch.mm(x, a.t(), out=torch.empty_like(s)), b.t(), out=torch.empty_like(y))

    def backward() -> None:
        ds, _ = torch.mm(y, b, out=torch.empty_like(s)), torch.mm(y.t(), s, out=torch.empty_like(b))
        torch.mm(ds.t(), x, out=torch.empty_like(a))
        torch.addmm(torch.mm(y, w, out=torch.empty_like(x)), ds, a, out=torch.empty_like(x))

    passes.add_calls("in a graph: eager's products", forward, backward)
    ops = torch.ops.fastlora
    for p in (0.0, 0.1):
        drawn = (2.0, p, "triton")
        layer = (x, w, bias, a, b, torch.zeros(1, dtype=torch.int64) if p else None)
        forward_op = partial(ops.lora_linear_forward.default, *layer, *drawn)
        with fastlora.use_backend("triton"):
            kept = (w, a, b, *forward_op()[1:])
            settings = (2.0, p, True, True, True, "triton")
            backward_op = partial(ops.lora_linear_backward.default, y, x, *kept, *settings)
            passes.add_calls(f"in a graph: our ops, p = {p}", forward_op, backward_op)
    return passes.rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--target", choices=[card for card in CARDS if card.startswith("sm_")], default="sm_90"
    )
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "fastlora-host-times"))
    parser.add_argument("--json", type=Path, help="file for the rows and what they were measured on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stage = Stage(arguments.target, arguments.cache, checking=False)
    stage.install()
    # as where there is one GPU
    stage.current = DEVICE.index
    rows = time_layers(stage) | time_graph_calls(stage)
    print(f"{'µs of the host':40} forward backward launches")
    for name, row in rows.items():
        print(f"{name:40} {row['forward']:7.0f} {row['backward']:8.0f} {row['launches']:8.0f}")
    if arguments.json:
        told: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
        told |= {"host": processor(), "target": arguments.target, "rows": rows}
        arguments.json.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
