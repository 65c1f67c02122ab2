"""Layers of ``apply_lora`` that compute together: as separate ones do, and gone without a trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastlora
from fastlora.nn.lora.shelf import Shelf
from fastlora.together.sources import sharing
from tests import sibling_models
from tests.cases import cases
from tests.quantised import four_bit
from tests.sibling_models import (
    FAMILIES,
    WAYS,
    WIDTH,
    Attention,
    Between,
    an_input,
    apart,
    assert_as_apart,
    assert_counts,
    assert_none_share,
    attention,
    family,
    groups,
    interrupt,
    run,
    separated,
    step,
)

# GPT-2's layers are no nn.Linear
QUICK = ("Llama", "T5", "ViT")
MORE = tuple(name for name in FAMILIES if name not in (*QUICK, "GPT-2"))
MLPS = ("Llama", "Qwen2", "Gemma", "Mistral", "Phi", "ViT", "BERT")


@pytest.fixture(autouse=True)
def way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models by ``apply_lora``."""
    monkeypatch.setattr(sibling_models, "way", WAYS["apply_lora"])


def kept(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass, beside parameters."""
    found = dict[int, int]()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**batch)
    del out
    return sum(found.values())


def traces(model: nn.Module) -> dict[str, tuple[type, set[str]]]:
    """Class and attributes of every module but linear layers, which are replaced."""
    modules = {name: module for name, module in model.named_modules() if type(module) is not nn.Linear}
    return {name: (type(module), set(vars(module))) for name, module in modules.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", cases(QUICK, MORE))
def test_a_step_is_that_of_separate_layers(name: str, dropout: float) -> None:
    model, batch = family(name, dropout=dropout)
    with groups() as seen:
        found = step(model, batch)
    assert 2 <= max(seen) <= 3
    assert_as_apart(found, step(separated(model), batch))


@pytest.mark.parametrize("name", cases(QUICK, MORE))
def test_less_is_kept_for_backward(name: str) -> None:
    model, batch = family(name)
    other = separated(model)
    options: Any = {"dtype": torch.bfloat16}
    with fastlora.use_backend("torch"), torch.autocast("cpu", **options):
        # x in autocast's dtype once
        assert kept(model, batch) < kept(other, batch)
    less, more = kept(model, batch), kept(other, batch)
    assert less < more if name in MLPS else less == more


def test_a_report_is_an_upper_bound_of_what_is_kept() -> None:
    model, batch = family("Llama")
    words = {name: batch[name] for name in ("input_ids",)}
    for execute in (False, True):
        reported = fastlora.parameter_report(model, sample_input=words, execute=execute).kept_bytes
        assert reported == kept(separated(model), words) > kept(model, words)


@pytest.mark.parametrize("name", cases(QUICK, MORE))
def test_a_saved_adapter_is_reloaded_and_computes_together(name: str, tmp_path: Path) -> None:
    model, batch = family(name)
    fastlora.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    loaded = FAMILIES[name]()[0].train()
    fastlora.load_adapter(loaded, tmp_path)
    with groups() as seen:
        found = step(loaded, batch)
    assert seen
    expected = step(model, batch)
    assert torch.equal(found["output"], expected["output"])
    assert torch.equal(found["loss"], expected["loss"])


@pytest.mark.parametrize("name", cases(["Llama"], ["T5", "BERT"]))
def test_removing_leaves_no_trace(name: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name]()[0]
    before = traces(model)
    fastlora.apply_lora(model)
    changed = {type(module).__name__ for module in model.modules()}
    assert ("FusedLlamaMLP" in changed) == (name == "Llama")
    fastlora.remove_adapters(model)
    assert traces(model) == before


def test_merged_layers_compute_by_themselves_until_they_are_unmerged() -> None:
    model, batch = family("Llama")
    expected = step(model, batch)
    fastlora.merge_adapters(model)
    with groups() as seen:
        out = model(**batch)
    assert not seen
    torch.testing.assert_close(out.logits, expected["output"], rtol=1e-4, atol=1e-5)
    assert_as_apart(step(fastlora.unmerge_adapters(model), batch), expected)


def test_adapters_by_name() -> None:
    model = WAYS["apply_lora"].adapt(nn.Sequential(Attention()))
    fastlora.add_adapter(model, "other", rank=3, dropout=0.5)
    for name in ("other", "default"):
        fastlora.set_adapter(model, name)
        with groups() as seen:
            found = run(model)
        assert seen == [3]
        assert_as_apart(found, run(separated(model)))
    fastlora.delete_adapter(model, "other")
    assert_as_apart(run(model), run(separated(model)))


def _another_adapter(module: Any, x: Tensor) -> Tensor:
    Shelf(module.k).add("other", module.q._settings())
    Shelf(module.k).activate("other")
    nn.init.ones_(module.k.lora_B)
    return x


def _unmerged(module: Any, x: Tensor) -> Tensor:
    module.k.merge()
    module.k.unmerge()
    return x


def _taken_out(module: Any, x: Tensor) -> Tensor:
    module.k = module.k.to_base()
    return x


@pytest.mark.parametrize("change", [_another_adapter, _unmerged, _taken_out])
def test_what_changes_between_two_calls_counts(change: Between) -> None:
    torch.manual_seed(2)
    assert_counts(change)


def _with_dora(module: Any) -> None:
    Shelf(module.k).add("dora", fastlora.nn.settings.LoRASettings(rank=2, dora=True))
    Shelf(module.k).activate("dora")


def _parametrized(module: Any) -> None:
    parametrize.register_parametrization(module.k, "lora_A", nn.Tanh())


def _start_and_dropout(module: Any) -> None:
    fastlora.init.pissa_(module)
    module.k.lora_dropout = 0.5


class Mine(fastlora.LoRALinear):
    """Does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _of_a_subclass(module: Any) -> None:
    module.k.__class__ = Mine


def _first_of_a_subclass(module: Any) -> None:
    module.q.__class__ = Mine


def _another_product(module: Any) -> None:
    vars(module.k)["_lora_linear"] = lambda x, *parts: module.k.lora_A.sum() * x


@pytest.mark.parametrize(
    "change",
    [
        _with_dora,
        _parametrized,
        _start_and_dropout,
        _of_a_subclass,
        _first_of_a_subclass,
        _another_product,
    ],
)
def test_what_is_computed_otherwise_is_computed_alone(change: Callable[[Any], None]) -> None:
    assert_none_share(change)


@pytest.mark.parametrize("name", ["forward", "_lora_linear"])
def test_whoever_patches_the_class_sees_every_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, seen = family("Llama")[0].model.layers[0].mlp, list[nn.Module]()
    original = getattr(fastlora.LoRALinear, name)

    def patched(layer: Any, *given: Any) -> Any:
        seen.append(layer)
        return original(layer, *given)

    monkeypatch.setattr(fastlora.LoRALinear, name, patched)
    mlp(an_input())
    assert seen == [mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def test_a_start_is_subtracted() -> None:
    module = attention()
    fastlora.init.pissa_(module)
    nn.init.normal_(module.k.lora_B)
    with groups() as seen:
        found = run(module)
    assert seen == [3]
    assert_as_apart(found, run(separated(module)))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_quantised_layers_share_where_they_compute_in_one_dtype(
    compute_dtype: torch.dtype, autocast: bool
) -> None:
    parent = Attention()
    parent.k = four_bit(WIDTH, WIDTH, compute_dtype=compute_dtype, bias=False)
    module = attention(parent)
    options: Any = {"dtype": torch.bfloat16, "enabled": autocast}
    with torch.autocast("cpu", **options), groups() as seen:
        found = run(module)
    assert seen == ([3] if autocast or compute_dtype is torch.float32 else [])
    with torch.autocast("cpu", **options):
        expected = run(separated(module))
    assert torch.equal(found["output"], expected["output"])
    assert found.keys() == expected.keys()


def test_a_layer_without_siblings_drops_what_was_left() -> None:
    module = attention()
    interrupt(module, lambda module, x: module.o(x))
    with apart():
        expected = run(module)
    assert_as_apart(run(module), expected)


def test_gate_and_up_are_found_in_an_mlp_whose_class_was_changed() -> None:
    mlp = family("Llama")[0].model.layers[0].mlp
    assert sharing(mlp, fastlora.LoRALinear) == [["gate_proj", "up_proj"]]
    # where the MLP runs its own forward, they still share
    mlp.down_proj.register_forward_pre_hook(lambda module, inputs: None)
    with groups() as seen:
        mlp(an_input())
    assert seen == [2]


def _merged(mlp: Any) -> None:
    mlp.down_proj.merge()


def _wrapped(mlp: Any) -> None:
    mlp.up_proj = nn.Sequential(mlp.up_proj)


@pytest.mark.parametrize("change", [_merged, _wrapped])
def test_what_happens_to_a_gated_mlp_counts(change: Callable[[Any], None]) -> None:
    model, batch = family("Llama")
    change(model.model.layers[0].mlp)
    assert_as_apart(step(model, batch), step(separated(model), batch))
