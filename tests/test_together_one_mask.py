"""Models whose layers that share x drop the same of it, on request."""

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fastlora
from fastlora.together.model import follow_layers
from tests import sibling_models
from tests.sibling_models import an_input, assert_as_apart, attention, family, groups, run, step
from tests.test_together_checkpoints import Checkpointed

pytestmark = pytest.mark.usefixtures("way")


def masks_of(work: Callable[[], Any]) -> int:
    """How many masks a computation keeps."""
    found = set[int]()

    def note(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.int8:
            found.add(tensor.data_ptr())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        kept = work()
    del kept
    return len(found)


@pytest.mark.parametrize(("name", "masks", "of_each"), [("Llama", 8, 14), ("BERT", 9, 13)])
def test_a_group_has_one_mask(name: str, masks: int, of_each: int) -> None:
    for one_mask, expected in ((True, masks), (False, of_each)):
        model, batch = family(name, dropout=0.1, one_mask=one_mask)
        assert masks_of(functools.partial(model, **batch)) == expected
        assert all(grad is None or grad.isfinite().all() for grad in step(model, batch).values())


def test_what_one_drops_the_others_drop() -> None:
    """Layers with equal weights have equal outputs."""
    module = attention(dropout=0.5, one_mask=True)
    for name in ("k", "v"):
        getattr(module, name).load_state_dict(module.q.state_dict())
    x = an_input()
    with groups() as seen:
        q, k, v = (getattr(module, name)(given) for given in (x * 1,) for name in ("q", "k", "v"))
    assert seen == [3]
    torch.testing.assert_close(k, q)
    torch.testing.assert_close(v, q)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_it(copied: Any) -> None:
    model, batch = family("Llama", dropout=0.1, one_mask=True)
    model = copied(model)
    assert masks_of(lambda: model(**batch)) == 8


def test_another_dropout_has_a_mask_of_its_own() -> None:
    module = attention(dropout=0.2, one_mask=True)
    sibling_models.way.set_dropout(module.v, 0.4)
    assert masks_of(lambda: module(an_input() * 1)) == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_repeats_it(reentrant: bool) -> None:
    module = attention(dropout=0.2, one_mask=True)
    expected = run(module)
    found = run(Checkpointed(module, use_reentrant=reentrant))
    assert_as_apart({name.removeprefix("module."): each for name, each in found.items()}, expected)


@pytest.mark.parametrize("way", ["accelerate"], indirect=True)
def test_whoever_asks_no_longer_has_masks_apart() -> None:
    model, batch = family("Llama", dropout=0.1, one_mask=True)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("default")
    assert masks_of(lambda: model(**batch)) == 8
    assert masks_of(lambda: fastlora.accelerate(model)(**batch)) == 14


def test_a_layer_that_is_called_alone_is_as_ever() -> None:
    module = attention(dropout=0.2, one_mask=True)
    x = an_input()
    torch.manual_seed(1)
    y = module.k(x)
    other = attention(dropout=0.2)
    torch.manual_seed(1)
    assert torch.equal(other.k(x), y)


def test_it_goes_with_each_layer() -> None:
    """Where another part of a model never asked, nothing that is done to the first makes it ask."""
    asked, other = family("Llama", dropout=0.1, one_mask=True)[0], family("Llama", dropout=0.1)[0]
    model = nn.ModuleDict({"asked": asked, "other": other})
    words = family("Llama")[1]
    follow_layers(model)
    assert [masks_of(functools.partial(part, **words)) for part in (asked, other)] == [8, 14]
    sibling_models.way.undo(asked)
    follow_layers(model)
    assert masks_of(functools.partial(other, **words)) == 14
    assert not any("_one_mask" in module.__dict__ for module in model.modules())


def test_only_true_and_false_are_taken() -> None:
    with pytest.raises(TypeError, match="expected one_mask to be True or False, got 'yes'"):
        family("Llama", dropout=0.1, one_mask="yes")


@pytest.mark.parametrize("way", ["apply_lora"], indirect=True)
def test_loading_leaves_it(tmp_path: Path) -> None:
    model, words = family("Llama", dropout=0.1, one_mask=True)
    fastlora.load_adapter(model, fastlora.save_adapter(model, tmp_path))
    assert masks_of(functools.partial(model, **words)) == 8
