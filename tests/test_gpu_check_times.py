"""How ``python -m fastlora.bench.gpu_check`` times, and what it says of the GPU's clocks."""

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType

pytest.importorskip("triton", reason="the check is of the kernels")

from fastlora.bench import clocks, results_file
from fastlora.bench.gpu_check import layers, profiled


def test_clocks_are_asked_of_the_gpu_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout="550.1, 1000 MHz\n")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="12-ab"))
    monkeypatch.setattr(subprocess, "run", run)
    assert results_file.gpu_clocks() == {"driver_version": "550.1", "clocks.sm": "1000 MHz"}
    assert asked[0][-1] == "--id=GPU-12-ab"


@pytest.mark.parametrize(("warm_ms", "calls"), [(1.0, 10), (0.01, 50), (80.0, 3)])
def test_a_series_is_as_long_as_warm_calls_are_short(
    warm_ms: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, made = [0.0], list[float]()

    def step() -> tuple[()]:
        made.append(warm_ms if made else 5000.0)
        now[0] += made[-1] / 1e3
        return ()

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = clocks.make_calls_clock(step)
    made.clear()
    made.append(0.0)
    assert clock(step) == pytest.approx(warm_ms)
    assert len(made) - 1 == calls


def test_only_other_packages_may_fail_to_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(step: Any, device: torch.device) -> Any:
        step()
        return SimpleNamespace(replay=step)

    def fails() -> Any:
        raise RuntimeError("not while capturing")

    monkeypatch.setattr(layers, "captured", captured)
    works: Any = lambda: ()  # noqa: E731
    made, failed = layers._graphs({"frozen": works, "peft": fails, "fastlora": works}, torch.device("cpu"))
    assert list(made) == ["frozen", "fastlora"]
    assert failed == {"peft": "RuntimeError: not while capturing"}
    for name in ("frozen", "reference", "fastlora"):
        with pytest.raises(RuntimeError, match="not while capturing"):
            layers._graphs({name: fails}, torch.device("cpu"))


def test_a_profile_has_each_kernels_share_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Profile:
        def __enter__(self) -> "Profile":
            return self

        def __exit__(self, *error: object) -> None:
            assert len(calls) == 10

        def key_averages(self) -> list[SimpleNamespace]:
            kinds = (
                ("short", DeviceType.CUDA, 20.0),
                ("aten::mm", DeviceType.CPU, 0.0),
                ("long", DeviceType.CUDA, 90.0),
            )
            return [
                SimpleNamespace(key=key, device_type=kind, self_device_time_total=us)
                for key, kind, us in kinds
            ]

    def step() -> tuple[()]:
        calls.append(1)
        return ()

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(profiled, "profile", lambda activities: Profile())
    assert list(profiled.kernel_us(step).items()) == [("long", 9.0), ("short", 2.0)]
