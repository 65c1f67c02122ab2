"""Gated MLPs of accelerated PEFT models, and of our own: the same numbers, with half of what they kept."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora
from fastlora.interop.peft import restore
from tests.mlp_models import calls_of_the_op, hook_on
from tests.sibling_models import WAYS, separated

Twins = Callable[[], tuple[Any, Any]]

# with their activations
FAMILIES = dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3"), "silu")
FAMILIES |= {"Gemma": "gelu_tanh", "Gemma2": "gelu_tanh", "Phi": "gelu_new"}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORDS = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(0))


def twins(family: str = "Llama", *, hidden_act: str | None = None, **given: Any) -> tuple[Any, Any]:
    """A PEFT model and its accelerated copy; LoRA's B is not zero."""
    torch.manual_seed(0)
    sizes = SIZES if hidden_act is None else SIZES | {"hidden_act": hidden_act}
    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    plain: Any = peft.get_peft_model(model, peft.LoraConfig(**options | given)).train()
    return plain, fastlora.accelerate(copy.deepcopy(plain))


def applied_twins() -> tuple[Any, Any]:
    """A model of ``apply_lora`` whose MLPs compute as their own classes do, and one with fused MLPs."""
    config = transformers.LlamaConfig(**SIZES)
    model = WAYS["apply_lora"].adapt(transformers.LlamaForCausalLM(config))
    return separated(model), model


WAYS_TO_TWINS = pytest.mark.parametrize("twins", [twins, applied_twins], ids=["accelerate", "apply_lora"])


def mlps(model: nn.Module) -> list[Any]:
    """The model's MLPs."""
    return [module for module in model.modules() if type(module).__name__.endswith("MLP")]


def loss_and_gradients(model: Any) -> dict[str, Tensor]:
    """Of one step, by parameter."""
    model.zero_grad()
    loss = model(input_ids=WORDS, labels=WORDS).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_equal_steps(plain: Any, accelerated: Any) -> None:
    expected, got = loss_and_gradients(plain), loss_and_gradients(accelerated)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=f"{name} is another")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_pefts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, accelerated = twins(family)
    seen = calls_of_the_op(monkeypatch)
    assert_equal_steps(plain, accelerated)
    assert seen == [FAMILIES[family]] * 2


def test_it_keeps_two_of_four_tensors() -> None:
    kept = []
    for model in twins():
        sizes = dict[int, int]()

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if tensor.numel() == WORDS.numel() * SIZES["intermediate_size"]:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(input_ids=WORDS)
        del out
        kept.append(sum(sizes.values()))
    assert kept[1] * 2 == kept[0] > 0


@WAYS_TO_TWINS
def test_copies_stay_fused(twins: Twins) -> None:
    plain, fused = twins()
    names = [type(mlp).__name__ for mlp in mlps(fused)]
    assert names == ["FusedLlamaMLP"] * 2
    copied = copy.deepcopy(fused)
    assert [type(mlp).__name__ for mlp in mlps(copied)] == names
    assert_equal_steps(plain, copied)
    mlp = pickle.loads(pickle.dumps(mlps(fused)[0]))
    x = torch.randn(3, 64)
    assert type(mlp) is type(mlps(fused)[0])
    assert torch.equal(mlp(x), mlps(fused)[0](x))


def test_the_models_own_classes_come_back() -> None:
    plain, accelerated = twins()
    restore(accelerated)
    assert [type(mlp).__name__ for mlp in mlps(accelerated)] == ["LlamaMLP"] * 2
    assert_equal_steps(plain, accelerated)


def _other_activation(mlp: Any) -> None:
    mlp.act_fn = nn.ReLU()


def _own_forward(mlp: Any) -> None:
    down = mlp.down_proj
    down.forward = lambda x: type(down).forward(down, x * 2)


@pytest.mark.parametrize("change", [hook_on("down_proj"), hook_on("act_fn"), _other_activation, _own_forward])
@WAYS_TO_TWINS
def test_what_changes_later_counts(
    twins: Twins, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = twins()
    for model in models:
        change(mlps(model)[0])
    seen = calls_of_the_op(monkeypatch)
    assert_equal_steps(*models)
    # the other MLP's
    assert seen == ["silu"]


def test_an_activation_that_changes_later_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    models = twins(hidden_act="gelu")
    for model in models:
        mlps(restore(model))[0].act_fn = nn.GELU()
    fastlora.accelerate(models[1])
    for model in models:
        mlps(model)[0].act_fn = nn.GELU(approximate="tanh")
    assert_equal_steps(*models)
    with monkeypatch.context() as patched:
        patched.setattr(type(mlps(models[0])[1].act_fn), "forward", lambda self, gate: F.relu(gate))
        assert_equal_steps(*models)


def test_a_class_that_is_patched_later_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    models = twins()
    kind: Any = type(mlps(models[0])[0])
    monkeypatch.setattr(kind, "forward", lambda self, x: self.down_proj(F.relu(self.gate_proj(x))))
    seen = calls_of_the_op(monkeypatch)
    assert_equal_steps(*models)
    assert not seen


def test_unknown_mlps_are_left_alone() -> None:
    class OtherMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
            self.down_proj, self.act_fn = nn.Linear(16, 8), nn.SiLU()

        def forward(self, x: Tensor) -> Any:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    config = peft.LoraConfig(r=2, target_modules=["down_proj"])
    model = fastlora.accelerate(peft.get_peft_model(nn.Sequential(OtherMLP()), config))
    assert [type(mlp) for mlp in mlps(model)] == [OtherMLP]


def test_two_adapters_at_once_are_one_and_switched_off_ones_are_pefts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = twins()
    for model in models:
        torch.manual_seed(1)
        model.add_adapter(
            "second", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )
        model.base_model.set_adapter(["default", "second"])
    seen = calls_of_the_op(monkeypatch)
    assert_equal_steps(*models)
    assert seen == ["silu"] * 2
    with models[0].disable_adapter(), models[1].disable_adapter(), torch.no_grad():
        outputs = [model(input_ids=WORDS).logits for model in models]
    assert torch.equal(*outputs)
    assert len(seen) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_it(reentrant: bool) -> None:
    _, accelerated = twins(lora_dropout=0.1)
    once: dict[str, dict[str, Tensor]] = {}
    for name, model in (("kept", accelerated), ("again", copy.deepcopy(accelerated))):
        if name == "again":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        once[name] = loss_and_gradients(model)
    for parameter, gradient in once["kept"].items():
        torch.testing.assert_close(once["again"][parameter], gradient, rtol=0, atol=0)


def test_it_generates_as_peft() -> None:
    plain, accelerated = twins()
    options = {"max_new_tokens": 8, "do_sample": False}
    words = [model.eval().generate(input_ids=WORDS, **options) for model in (plain, accelerated)]
    assert torch.equal(*words)


@WAYS_TO_TWINS
def test_it_compiles_without_graph_breaks(twins: Twins) -> None:
    _, accelerated = twins()
    mlp, x = mlps(accelerated)[0], torch.randn(2, 5, 64)
    compiled: Any = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    torch.testing.assert_close(got, mlp(x))
