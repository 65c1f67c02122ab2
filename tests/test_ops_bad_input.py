"""Arguments that the op refuses: one clear error each, before anything is drawn or changed."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora._core import backend as _backend
from fastlora.functional import lora_linear

M, N, K, R = 4, 5, 6, 2


def arguments(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "x": torch.randn(M, K),
        "weight": torch.randn(N, K),
        "bias": torch.randn(N),
        "lora_A": torch.randn(R, K),
        "lora_B": torch.randn(N, R),
        "scaling": 1.0,
        "dropout": 0.0,
    }
    return given | changes


Make = Callable[[], Any]
BAD: dict[str, tuple[str, Make, type[Exception], str]] = {
    "last dimension": (
        "x",
        lambda: torch.randn(M, K + 1),
        ValueError,
        r"last dimension 6 .*got shape \(4, 7\)",
    ),
    "no dimension": ("x", lambda: torch.tensor(1.0), ValueError, r"last dimension 6"),
    "integer x": (
        "x",
        lambda: torch.ones(M, K, dtype=torch.int64),
        TypeError,
        "x in float64.*got torch.int64",
    ),
    "complex x": ("x", lambda: torch.ones(M, K, dtype=torch.complex64), TypeError, "got torch.complex64"),
    "not a tensor": ("x", lambda: [[1.0] * K], TypeError, "x to be a torch.Tensor, got list"),
    "no x": ("x", lambda: None, TypeError, "x to be a torch.Tensor, got NoneType"),
    "no weight": ("weight", lambda: None, TypeError, "weight to be a torch.Tensor, got NoneType"),
    "no A": ("lora_A", lambda: None, TypeError, "lora_A to be a torch.Tensor, got NoneType"),
    "no B": ("lora_B", lambda: None, TypeError, "lora_B to be a torch.Tensor, got NoneType"),
    "int8 weight": (
        "weight",
        lambda: torch.ones(N, K, dtype=torch.int8),
        TypeError,
        "a quantised layer's weight as",
    ),
    "float8 weight": (
        "weight",
        lambda: torch.ones(N, K).to(torch.float8_e4m3fn),
        TypeError,
        "a quantised layer's weight as",
    ),
    "weight's dimensions": ("weight", lambda: torch.randn(N), ValueError, "weight with 2 dimensions"),
    "meta weight": (
        "weight",
        lambda: torch.empty(N, K, device="meta"),
        ValueError,
        "meta tensor holds no data",
    ),
    "meta adapter": (
        "lora_A",
        lambda: torch.empty(R, K, device="meta"),
        ValueError,
        "x on cpu.*lora_A on meta",
    ),
    "rank zero": ("lora_A", lambda: torch.empty(0, K), ValueError, "rank of at least 1"),
    "A does not fit": ("lora_A", lambda: torch.randn(R, K + 1), ValueError, r"lora_A \[rank, 6\]"),
    "A and B differ": ("lora_B", lambda: torch.randn(N, R + 1), ValueError, r"lora_B \[5, rank\].*\(5, 3\)"),
    "bias does not fit": ("bias", lambda: torch.randn(N + 1), ValueError, r"bias with shape \(5,\)"),
    "dtypes differ": (
        "weight",
        lambda: torch.randn(N, K).half(),
        ValueError,
        "weight in x's dtype torch.float32",
    ),
    "sparse weight": ("weight", lambda: torch.eye(N, K).to_sparse(), TypeError, "weight to be dense"),
    "dropout is text": ("dropout", lambda: "0.1", TypeError, "dropout to be a number, got '0.1'"),
    "scaling is text": ("scaling", lambda: "2", TypeError, "scaling to be a number, got '2'"),
    "dropout above one": ("dropout", lambda: 1.5, ValueError, r"dropout probability in \[0, 1\], got 1.5"),
    "negative dropout": ("dropout", lambda: -0.1, ValueError, r"got -0.1"),
    "dropout is nan": ("dropout", lambda: float("nan"), ValueError, r"got nan"),
    "infinite scaling": ("scaling", lambda: float("inf"), ValueError, "finite scaling"),
}


@pytest.mark.parametrize(("name", "make", "error", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_refused(backend: str, name: str, make: Make, error: type[Exception], message: str) -> None:
    given = arguments(**{name: make()})
    state = torch.get_rng_state()
    with fastlora.use_backend(backend), pytest.raises(error, match=message):
        lora_linear(**given)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_backend() -> None:
    with pytest.raises(
        ValueError, match=r"expected a backend out of auto, triton, torch, reference, got 'cuda'"
    ):
        fastlora.set_backend("cuda")


def test_backend_named_in_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora._core.backend._selected", "fast")
    with pytest.raises(ValueError, match=r"got 'fast'; set it with fastlora.set_backend.*FASTLORA_BACKEND"):
        lora_linear(**arguments())


def test_use_backend_restores_on_error() -> None:
    with pytest.raises(KeyError), fastlora.use_backend("reference"):
        raise KeyError
    with fastlora.use_backend("torch"):
        y: Tensor = lora_linear(**arguments())
    assert torch.isfinite(y).all()


def test_triton_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora._core.backend.interpreter_enabled", lambda: False)
    with (
        fastlora.use_backend("triton"),
        pytest.raises(ValueError, match="serves CUDA tensors, got a tensor on cpu"),
    ):
        lora_linear(**arguments())
    monkeypatch.setattr("fastlora._core.backend.triton_available", lambda: False)
    with fastlora.use_backend("triton"), pytest.raises(ValueError, match="triton is not installed"):
        lora_linear(**arguments())


def test_without_a_compiler_auto_takes_the_library_and_a_name_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton builds its launcher with a C compiler at run time, which slim images lack."""

    class NoCompiler:
        @property
        def active(self) -> Any:
            raise RuntimeError("Failed to find C compiler")

    gpu = torch.device("cuda")
    monkeypatch.setattr("triton.runtime.driver", NoCompiler())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = (_backend.launch_failure, _backend._can_launch)
    for each in asked:
        each.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Failed to find C compiler.*uses library products instead"):
            assert _backend.resolve(gpu, torch.float16) == "torch"
        with warnings.catch_warnings():
            # told once, though warnings are always shown here
            warnings.simplefilter("error")
            assert _backend.resolve(gpu, torch.float16) == "torch"
        with fastlora.use_backend("triton"), pytest.raises(ValueError, match="it needs a C compiler"):
            _backend.resolve(gpu, torch.float16)
    finally:
        for each in asked:
            each.cache_clear()


def test_a_cached_driver_does_not_hide_that_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 builds a launcher for every kernel; from 3.7 on the driver, once built, has one for all."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    _backend._check_compiler("3.7.0")
    with pytest.raises(RuntimeError, match="neither gcc nor clang"):
        _backend._check_compiler("3.6.0+git1")
    monkeypatch.setenv("CC", "tcc")
    _backend._check_compiler("3.6.0")
