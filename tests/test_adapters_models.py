"""apply_adapters in every known kind of model: where, exactly what, and that all of it trains."""

import contextlib
import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlora
from fastlora.anatomy.names import adapted_modules
from fastlora.nn import AdapterLayer
from tests.adapter_models import CASES, PLACED, Case, adapted, place, randomize_bottlenecks
from tests.cases import cases
from tests.lora_models import same_bits

ALL = pytest.mark.parametrize(("case", "placement"), PLACED)
MODELS = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@contextlib.contextmanager
def library_attention() -> Iterator[None]:
    """Torch chooses faster attention where no gradient is wanted, which rounds differently."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@ALL
def test_the_places_are_those_of_the_papers(case: Case, placement: Any) -> None:
    model = fastlora.apply_adapters(case.make(), placement=placement, adapter_size=3)
    assert list(adapted_modules(model)) == case.places(placement)
    for module in adapted_modules(model).values():
        assert (module.adapter.hidden_size, module.adapter.adapter_size) == (8, 3)


@ALL
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_first_output_is_the_frozen_models(case: Case, placement: Any, training: bool) -> None:
    model = case.make().train(training).requires_grad_(False)
    if training:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    settings: dict[str, Any] = {"placement": placement, "layer_norm": "pre", "scale": "learned"}
    with library_attention():
        before = case.run(model)
        fastlora.apply_adapters(model, **settings)
        assert all(module.training is training for module in model.modules())
        assert torch.equal(case.run(model), before)
    fastlora.remove_adapters(model)
    if case is CASES["torch"] and not training:
        # its fused inference path rounds differently, and would skip the adapters
        return
    with torch.no_grad():
        before = case.run(model)
        assert torch.equal(case.run(fastlora.apply_adapters(model, **settings)), before)


@ALL
def test_every_trainable_tensor_gets_a_gradient(case: Case, placement: Any) -> None:
    model = randomize_bottlenecks(
        fastlora.apply_adapters(
            case.make(),
            placement=placement,
            adapter_size=3,
            activation="silu",
            layer_norm="pre",
            scale="learned",
        )
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 7 * len(case.places(placement))
    out = case.run(model)
    torch.autograd.backward((out * torch.randn_like(out)).sum())
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == trainable


@MODELS
def test_state_dicts_keep_the_plain_models_names(case: Case) -> None:
    base = case.make()
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapted(copy.deepcopy(base))
    state = model.state_dict()
    ours = [name for name in state if ".adapter." in name]
    assert {name.split(".adapter.")[0] for name in ours} == set(case.places("houlsby"))
    assert [name for name in state if name not in ours] == list(plain)
    assert list(state._metadata) == list(dict.fromkeys(name for name in state._metadata))  # type: ignore[attr-defined]
    assert not any("_adapted" in name for name in state._metadata)  # type: ignore[attr-defined]
    # a plain checkpoint loads, and changes no adapter; so does one with adapters, and gives the same bits
    before = {name: state[name].clone() for name in ours}
    altered = {name: tensor + 1 for name, tensor in plain.items()}
    model.load_state_dict(altered)
    assert all(same_bits(model.state_dict()[name], before[name]) for name in ours)
    assert all(same_bits(model.state_dict()[name], altered[name]) for name in altered)
    other = fastlora.apply_adapters(copy.deepcopy(base), adapter_size=3)
    other.load_state_dict(adapted(copy.deepcopy(base)).state_dict())
    assert torch.equal(case.run(other.eval()), case.run(adapted(copy.deepcopy(base))))


@MODELS
def test_removing_gives_the_original_objects_back(case: Case) -> None:
    # torch's attention may round differently once weights are frozen
    model = case.make().eval().requires_grad_(False)
    modules = {name: id(module) for name, module in model.named_modules()}
    attributes = {name: vars(module).keys() for name, module in model.named_modules()}
    with torch.no_grad():
        before = case.run(model)
    randomize_bottlenecks(fastlora.apply_adapters(model, adapter_size=3))
    with torch.no_grad():
        assert not torch.allclose(case.run(model), before, atol=1e-3)
    assert fastlora.remove_adapters(model) is model
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: vars(module).keys() for name, module in model.named_modules()} == attributes
    with torch.no_grad():
        assert same_bits(case.run(model), before)


@MODELS
def test_copies_and_pickles_compute_the_same(case: Case) -> None:
    model = adapted(case.make(), scale="learned", layer_norm="post")
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(case.run(other), case.run(model))
        randomize_bottlenecks(other, seed=2)
        assert not torch.equal(case.run(other), case.run(model))
        fastlora.remove_adapters(other)


COMPILED = ("timm-parallel", "torch-pfeiffer")


@pytest.mark.parametrize(
    ("case", "placement"),
    cases(
        [each for each in PLACED if each.id in COMPILED], [each for each in PLACED if each.id not in COMPILED]
    ),
)
def test_models_compile_whole(case: Case, placement: Any) -> None:
    torch.compiler.reset()
    model = adapted(case.make(), placement=placement, scale="learned")
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(case.run(compiled), case.run(model), rtol=1e-4, atol=1e-5)


@ALL
def test_activation_checkpointing_changes_nothing(case: Case, placement: Any) -> None:
    model = adapted(case.make(), placement=placement, dropout=0.5)
    checkpointed = copy.deepcopy(model)
    names = {id(module) for module in adapted_modules(checkpointed).values()}
    apply_activation_checkpointing(checkpointed, check_fn=lambda module: id(module) in names)
    results: list[list[Tensor]] = []
    for run in (model, checkpointed):
        for module in run.modules():
            if isinstance(module, AdapterLayer):
                module.train()
        torch.manual_seed(3)
        out = case.run(run)
        torch.autograd.backward((out * torch.arange(out.numel()).view_as(out)).sum())
        results.append([out, *(p.grad for p in run.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 4
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@MODELS
def test_other_precisions(case: Case, dtype: torch.dtype) -> None:
    model = case.make().to(dtype).eval()
    fastlora.apply_adapters(model, adapter_size=3, scale="learned", layer_norm="pre")
    expected = dtype if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    inputs = (x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
    out = case.run(randomize_bottlenecks(model), *inputs)
    assert out.dtype == dtype
    torch.autograd.backward(out.float().square().mean())
    assert all(p.grad is not None and p.grad.dtype == expected for p in model.parameters() if p.requires_grad)


def test_hugging_face_checkpointing_and_outputs() -> None:
    case = CASES["bert"]
    model = adapted(case.make())
    asked: Any = model
    assert len(asked(*case.inputs(), output_hidden_states=True).hidden_states) == 3
    expected = case.run(model)
    asked.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    asked.gradient_checkpointing_enable()
    torch.autograd.backward(case.run(model).sum())
    torch.testing.assert_close(case.run(model), expected)
    assert place(model, case.places("houlsby")[0]).adapter.up_proj.weight.grad is not None
