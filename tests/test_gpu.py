"""What only a GPU can show of the ops: large layers there, and launches that a CUDA graph repeats."""

import pytest
import torch
from torch import Tensor

import fastlora
from tests.lora_yardstick import assert_as_exact_as_eager, make_case, outputs_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; elsewhere the interpreter runs"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_large_layers_are_as_exact_as_eager(backend: str, dtype: torch.dtype) -> None:
    case = make_case(4097, 2048, 1024, 16, dtype, device="cuda")
    with fastlora.use_backend(backend):
        got = outputs_and_gradients(
            lambda x, a, b: fastlora.functional.lora_linear(
                x, case.weight, case.bias, a, b, scaling=case.scaling
            ),
            case,
        )
    assert_as_exact_as_eager(got, case)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_candidate_of_tune_is_right(dropout: float) -> None:
    """Every path and every tile that this GPU's plans can choose, the persistent ones among them."""
    from fastlora.tuning.calls import LayerCall
    from fastlora.tuning.search import tune_call
    from fastlora.tuning.timing import gpu_timer

    device = torch.device("cuda", torch.cuda.current_device())
    call = LayerCall(rows=1029, inputs=1024, outputs=2048, dropout=dropout)
    found, left_out = tune_call(call, device, gpu_timer(device), lambda what: None)
    assert left_out == []
    assert found is not None
    assert found.from_host is not None
    assert found.from_host.microseconds["step"]["fused"] >= found.microseconds["step"]["fused"] > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_candidate_of_layers_that_share_their_input_is_right(dropout: float) -> None:
    from fastlora.tuning.calls import LayerCall, SharedCall
    from fastlora.tuning.search import name_of
    from fastlora.tuning.shared import choices_of, tune_shared
    from fastlora.tuning.timing import gpu_timer

    device = torch.device("cuda", torch.cuda.current_device())
    layers = tuple(LayerCall(1029, 1024, outputs, dropout=dropout) for outputs in (2048, 512, 512))
    call = SharedCall(layers)
    found, left_out = tune_shared(call, device, gpu_timer(device), lambda what: None)
    assert left_out == []
    assert found is not None
    for taken in found.microseconds.values():
        assert [*taken] == [name_of(choice) for choice in choices_of(call, device)]
        assert min(taken.values()) > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_cuda_graph_repeats_a_training_step(dora: bool, dropout: float) -> None:
    """No launch waits for the host; the replayed mask is a new one each time."""
    layer = fastlora.LoRALinear(
        256, 512, rank=16, dropout=dropout, dora=dora, device="cuda", dtype=torch.bfloat16
    )
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)

    def step() -> Tensor:
        layer.zero_grad(set_to_none=False)
        y: Tensor = layer(x)
        y.square().mean().backward()
        return y

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    seen = []
    x.normal_()
    for _ in range(2):
        graph.replay()
        seen.append(y.clone())
    assert torch.equal(*seen) == (dropout == 0)
    if dropout == 0:
        torch.testing.assert_close(seen[-1], layer(x))
