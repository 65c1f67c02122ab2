"""Accelerated PEFT models on quantised bases answer and learn as PEFT's own."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import decompress_module
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

import fastlora
from fastlora.interop._peft_fused import Fused
from tests.cases import cases
from tests.peft_twins import assert_equal_runs, awake
from tests.quantised import compressed, read
from tests.quantised_twins import (
    BASES,
    IN,
    OUT,
    Net,
    assert_as_good,
    exact_model,
    inputs,
    is_fused,
    lora_layer,
    nf4,
    peft_around,
    peft_model,
    run,
    twin,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", BASES)
def test_outputs_and_gradients_are_those_of_peft(base: str, config: str, dtype: torch.dtype) -> None:
    # PEFT has no bias of LoRA's there
    settings = {} if base.startswith("torchao") and config == "bias" else CONFIGS[config]
    eager = peft_model(base, dtype, **settings)
    model = fastlora.accelerate(twin(eager))
    x = inputs(dtype)
    assert is_fused(model, x)
    assert_as_good(run(model, x), run(eager, x), run(exact_model(eager), x.double()))


@pytest.mark.parametrize("base", ["nf4", "int8", "torchao int8", "torchao float8", "torchao nf4"])
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(base: str, x: torch.dtype) -> None:
    """Layers of a model that ``prepare_model_for_kbit_training`` prepared are given float32."""
    eager = peft_model(base, torch.bfloat16)
    model = fastlora.accelerate(twin(eager))
    exact = run(exact_model(eager), inputs(x).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # others compute in x's dtype, or in autocast's
        assert is_fused(model, inputs(x)) == (base == "nf4" or x is torch.bfloat16)
    found, own = (run(each, inputs(x), autocast=True) for each in (model, eager))
    assert_as_good(found, own, exact)


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_the_dtype_that_the_layer_computes_in(
    compute: torch.dtype | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Without one, the first call decides: bitsandbytes keeps it for those that follow."""
    net = Net(nf4(torch.float32, compute_dtype=compute), "4bit")
    eager: Any = awake(get_peft_model(net, LoraConfig(r=4, target_modules=["layer"])))
    model = fastlora.accelerate(copy.deepcopy(eager))
    for dtype in dtypes:
        x = inputs(dtype)
        y, expected = model(x), eager(x)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
        assert is_fused(model, x) == (dtype == (compute or dtypes[0]))
    assert lora_layer(model).base_layer.compute_dtype == lora_layer(eager).base_layer.compute_dtype


@pytest.mark.parametrize("base", BASES)
def test_dropout_and_two_adapters(base: str) -> None:
    model = peft_model(base, torch.float32, lora_dropout=0.5)
    model.add_adapter("b", LoraConfig(r=3, target_modules=["layer"]))
    awake(model).base_model.set_adapter(["default", "b"])
    eager = twin(model)
    fastlora.accelerate(model)
    assert is_fused(model, inputs())
    found = run(model, inputs())
    assert not torch.equal(found["output"], run(eager, inputs())["output"])
    for each in (model, eager):
        lora_layer(each).lora_dropout.eval()
    assert_as_good(run(model, inputs()), run(eager, inputs()), run(exact_model(eager), inputs().double()))


@pytest.mark.parametrize("base", cases(["nf4", "torchao int8"], ["int8", "torchao float8", "torchao nf4"]))
def test_compiled_without_a_graph_break(base: str) -> None:
    model = fastlora.accelerate(peft_model(base, torch.float32))
    expected = run(model, inputs())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = run(compiled, inputs())
    assert_equal_runs({name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}, expected)


@pytest.mark.parametrize("blocks", [None, (32, 64)], ids=["one factor", "blocks"])
def test_fp8_layers_of_transformers_train_on_a_cpu(blocks: tuple[int, int] | None) -> None:
    """transformers#46736; their own forward needs a GPU, so a dense layer of their values is compared."""
    torch.manual_seed(0)
    base: Any = FP8Linear(IN, OUT, block_size=blocks, has_bias=True)
    base.weight.data = torch.randn(OUT, IN).to(base.weight.dtype)
    base.weight_scale_inv.data = torch.rand_like(base.weight_scale_inv)
    nn.init.normal_(base.bias)
    dense = nn.Linear(IN, OUT)
    dense.load_state_dict({"weight": read(base).dense(torch.float32), "bias": base.bias})
    config = LoraConfig(r=4, target_modules=["layer"])
    eager, model = (awake(get_peft_model(Net(layer), config)) for layer in (dense, base))
    fastlora.accelerate(model)
    assert is_fused(model, inputs())
    assert_equal_runs(run(model, inputs()), run(eager, inputs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int", "float"])
def test_layers_that_compressed_tensors_compressed(
    kind: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT's can't be called until they are decompressed."""
    eager = peft_around(Net(compressed(OUT, IN, dtype, type=kind, strategy="channel")))
    model = fastlora.accelerate(copy.deepcopy(eager))
    decompress_module(lora_layer(eager).base_layer)
    x = inputs(dtype)
    assert is_fused(model, x)
    assert_as_good(run(model, x), run(eager, x), run(exact_model(eager), x.double()))
    decompress_module(lora_layer(model).base_layer)
    assert not is_fused(model, x)
    assert_equal_runs(run(model, x), run(eager, x), exactly=True)
    fastlora.accelerate(model)
    assert "left to PEFT: 1 lora.Linear on layer of compressed-tensors that is decompressed" in caplog.text


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_loads_quantised(bits: int, tmp_path: Path) -> None:
    """Prepared for training as PEFT says, checkpointed, under autocast, evaluated between two steps."""
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "vocab_size": 64,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(tmp_path)
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    prepare: Any = prepare_model_for_kbit_training
    make: Any = BitsAndBytesConfig
    how = make(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **settings)
    words = torch.arange(24).view(2, 12)
    losses = []
    for accelerated in (False, True):
        loaded = LlamaForCausalLM.from_pretrained(
            tmp_path, quantization_config=how, device_map={"": "cpu"}, dtype=torch.bfloat16
        )
        base = prepare(loaded, gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        if accelerated:
            fastlora.accelerate(model)
            assert sum(isinstance(module, Fused) for module in model.modules()) == 14
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model.train()(words, labels=words).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if accelerated:
                with torch.no_grad():
                    model.eval()(words)
            losses.append(loss.item())
    assert losses[3] < losses[0] - 0.1
    assert losses[4:] == pytest.approx(losses[:4], rel=3e-3)


def test_what_peft_computes_it_computes() -> None:
    """Without its adapters a model is its base, which is never called otherwise."""
    eager = peft_model("nf4", torch.float32)
    model = fastlora.accelerate(copy.deepcopy(eager))
    with model.disable_adapter(), eager.disable_adapter():
        assert torch.equal(model(inputs()), eager(inputs()))
    for each in (model, eager):
        with pytest.warns(UserWarning, match="4-bit linear may get different generations"):
            each.merge_adapter()
    assert torch.equal(model(inputs()), eager(inputs()))
    for each in (model, eager):
        with pytest.warns(UserWarning, match="4-bit linear may get different generations"):
            each.unmerge_adapter()
    assert is_fused(model, inputs())
    torch.testing.assert_close(model(inputs()), eager(inputs()))


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_accelerated_and_restored(base: str, way: str) -> None:
    eager = peft_model(base, torch.float32)
    model = fastlora.accelerate(copy.deepcopy(eager))
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert is_fused(copied, inputs())
    expected = run(eager, inputs())
    assert_equal_runs(run(copied, inputs()), expected)
    fastlora.restore(copied)
    assert type(lora_layer(copied)) is type(lora_layer(eager))
    assert_equal_runs(run(copied, inputs()), expected, exactly=True)
    assert is_fused(model, inputs())
