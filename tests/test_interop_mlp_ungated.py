"""MLPs without a gate in accelerated PEFT models: the same numbers, with one tensor kept of their width."""

import copy
import pickle
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import peft
import pytest
import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, GPTJConfig, NemotronConfig, PhiConfig, ViTConfig, Wav2Vec2Config
from transformers.models.vit.modeling_vit import ViTMLP

from fastlora.interop.peft import restore
from tests.mlp_models import (
    INNER,
    ROWS,
    WIDTH,
    assert_equal_steps,
    calls_of_the_op,
    hook_on,
    kept_of_inner_width,
    step,
)
from tests.peft_twins import apart_and_fused, layer_of
from tests.quantised import four_bit

SIZES: Any = {"hidden_size": WIDTH, "intermediate_size": INNER}


class Case(NamedTuple):
    """An MLP, the op's name of its activation, and how many tensors of its inner width PEFT's layers keep."""

    make: Callable[[], nn.Module]
    activation: str
    kept: int


def _of(family: str, name: str) -> Any:
    """A class of transformers', which is not typed."""
    return getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)


def _vit(hidden_act: str = "gelu") -> nn.Module:
    return ViTMLP(ViTConfig(hidden_act=hidden_act, **SIZES))


def _gptj() -> Any:
    return _of("gptj", "GPTJMLP")(INNER, GPTJConfig(n_embd=WIDTH, resid_pdrop=0.3))


def _wav2vec2(dropout: float = 0.0) -> Any:
    return _of("wav2vec2", "Wav2Vec2FeedForward")(
        Wav2Vec2Config(activation_dropout=dropout, hidden_dropout=0.3, **SIZES)
    )


CASES = {
    "ViT": Case(_vit, "gelu", 2),
    "SigLIP": Case(lambda: _vit("gelu_pytorch_tanh"), "gelu_tanh", 2),
    "CLIP": Case(
        lambda: _of("clip", "CLIPMLP")(CLIPVisionConfig(num_attention_heads=4, **SIZES)), "quick_gelu", 3
    ),
    "Phi": Case(lambda: _of("phi", "PhiMLP")(PhiConfig(**SIZES)), "gelu_new", 5),
    "GPT-J": Case(_gptj, "gelu_new", 5),
    "silu": Case(
        lambda: _of("nemotron", "NemotronMLP")(NemotronConfig(hidden_act="silu", **SIZES)), "silu", 2
    ),
    "wav2vec 2.0": Case(_wav2vec2, "gelu", 2),
    "timm": Case(lambda: Mlp(WIDTH, INNER), "gelu", 2),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def twins(make: Callable[[], nn.Module] = _vit, **given: Any) -> tuple[Any, Any]:
    """An accelerated model of one MLP whose layers are apart, and its copy with the MLP fused."""
    torch.manual_seed(0)
    mlp = make()
    targets = [name for name, module in mlp.named_modules() if isinstance(module, nn.Linear)]
    return apart_and_fused(mlp, **{"target_modules": targets} | given)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Activations with which the op is called from now on."""
    return calls_of_the_op(monkeypatch)


@by_case
def test_a_step_is_that_of_layers_apart(case: Case, seen: list[str]) -> None:
    assert_equal_steps(*twins(case.make))
    assert seen == [case.activation]


@by_case
def test_one_tensor_of_the_inner_width_is_kept(case: Case) -> None:
    kept = [kept_of_inner_width(model) for model in twins(case.make)]
    assert kept == [case.kept, 1]


# of a formula, backward rounds less often
@pytest.mark.parametrize(("make", "has_equal_gradients"), [(_vit, True), (_gptj, False)])
def test_bfloat16_and_autocast(
    make: Callable[[], nn.Module], has_equal_gradients: bool, seen: list[str]
) -> None:
    models = twins(make)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_steps(*models)
    for model in models:
        model.to(torch.bfloat16)
    expected, got = (step(model) for model in models)
    for name in expected if has_equal_gradients else ("y",):
        assert torch.equal(got[name], expected[name]), name
    assert len(seen) == 2


def test_a_quantised_last_layer(seen: list[str]) -> None:
    def make() -> Any:
        mlp: Any = _vit()
        mlp.fc2 = four_bit(WIDTH, INNER)
        return mlp

    models = twins(make)
    assert_equal_steps(*models)
    # the layer's dtype is x's, before and after the activation
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_steps(*models)
    assert seen


def test_dropout_before_the_last_layer_is_left_to_the_model(seen: list[str]) -> None:
    models = twins(lambda: _wav2vec2(0.3))
    assert_equal_steps(*models)
    assert not seen
    for model in models:
        model.eval()
    assert_equal_steps(*models)
    assert seen == ["gelu"]


def _other(name: str, module: nn.Module) -> Callable[[Any], None]:
    return lambda mlp: setattr(mlp, name, module)


@pytest.mark.parametrize(
    ("change", "activations"),
    [
        (hook_on("fc2"), []),
        (hook_on("act"), []),
        (hook_on("drop1"), []),
        (hook_on("fc1"), ["gelu"]),
        (hook_on("drop2"), ["gelu"]),
        (_other("act", nn.ReLU()), []),
        (_other("act", nn.GELU(approximate="tanh")), []),
        (_other("norm", nn.LayerNorm(INNER)), []),
        (_other("norm", nn.Hardtanh()), []),
    ],
)
def test_what_changes_later_counts(
    change: Callable[[Any], None], activations: list[str], seen: list[str]
) -> None:
    models = twins(CASES["timm"].make)
    for model in models:
        change(layer_of(model))
    assert_equal_steps(*models)
    assert seen == activations


def test_a_class_that_is_patched_later_is_patched(monkeypatch: pytest.MonkeyPatch, seen: list[str]) -> None:
    models = twins()
    monkeypatch.setattr(ViTMLP, "forward", lambda self, x: self.fc2(F.relu(self.fc1(x))))
    assert_equal_steps(*models)
    assert not seen


def test_other_activations_and_forwards_are_left_alone() -> None:
    class Scaled(ViTMLP):
        def forward(self, hidden_states: Tensor) -> Tensor:
            hidden_states = self.fc1(hidden_states)
            hidden_states = self.activation_fn(hidden_states)
            hidden_states = self.fc2(hidden_states)
            return hidden_states * 2

    relu, scaled = twins(lambda: _vit("relu"))[1], twins(lambda: Scaled(ViTConfig(**SIZES)))[1]
    assert [type(layer_of(model)) for model in (relu, scaled)] == [ViTMLP, Scaled]


def test_the_models_own_class_comes_back_and_copies_stay_fused() -> None:
    plain, fused = twins()
    assert type(layer_of(fused)).__name__ == "FusedViTMLP"
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(layer_of(copied)) is type(layer_of(fused))
        assert_equal_steps(plain, copied)
    assert type(layer_of(restore(fused))) is ViTMLP


def test_adapters_switched_off_or_two_at_once(seen: list[str]) -> None:
    models = twins()
    config = peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False)
    for model in models:
        torch.manual_seed(2)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    assert_equal_steps(*models)
    assert seen == ["gelu"]
    x = torch.randn(3, WIDTH)
    with models[0].disable_adapter(), models[1].disable_adapter(), torch.no_grad():
        assert torch.equal(models[0](x), models[1](x))
    assert len(seen) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_it(reentrant: bool) -> None:
    _, fused = twins(lora_dropout=0.3)
    again = copy.deepcopy(fused)
    inner = again.forward
    again.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    expected, got = step(fused), step(again)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("make", [_vit, CASES["Phi"].make])
def test_it_compiles_without_graph_breaks(make: Callable[[], nn.Module]) -> None:
    mlp = layer_of(twins(make)[1])
    x = torch.randn(*ROWS, WIDTH)
    compiled: Any = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mlp(x))
