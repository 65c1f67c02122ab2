"""LoRAMultiheadAttention against nn.MultiheadAttention, argument by argument."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora import LoRALinear, LoRAMultiheadAttention
from tests.lora_models import randomize_adapters, same_bits

EMBED, HEADS, BATCH, LENGTH, SOURCE = 12, 3, 2, 5, 7
Inputs = tuple[Tensor, Tensor, Tensor]


def pair(
    *, batch_first: bool = True, bias: bool = True, **settings: Any
) -> tuple[nn.MultiheadAttention, LoRAMultiheadAttention]:
    plain = nn.MultiheadAttention(EMBED, HEADS, bias=bias, batch_first=batch_first)
    if bias:
        # torch starts biases at zero, which would hide one that is forgotten
        nn.init.normal_(plain.in_proj_bias)
        nn.init.normal_(plain.out_proj.bias)
    return plain, LoRAMultiheadAttention.from_attention(
        copy.deepcopy(plain), **{"rank": 2, "alpha": 2, **settings}
    )


def inputs(kind: str, *, batch_first: bool = True, batched: bool = True) -> Inputs:
    def sequence(length: int) -> Tensor:
        if not batched:
            return torch.randn(length, EMBED)
        return torch.randn(BATCH, length, EMBED) if batch_first else torch.randn(length, BATCH, EMBED)

    query = sequence(LENGTH)
    if kind == "self":
        return query, query, query
    key = sequence(SOURCE)
    return (query, key, key) if kind == "cross" else (query, key, sequence(SOURCE))


def assert_same(actual: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    assert (actual[1] is None) == (expected[1] is None)
    if actual[1] is not None:
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["self", "cross", "three"])
@pytest.mark.parametrize("layout", ["batch-first", "length-first", "unbatched"])
@pytest.mark.parametrize("weights", ["none", "mean", "heads"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_equals_the_original(kind: str, layout: str, weights: str, training: bool, bias: bool) -> None:
    batch_first = layout == "batch-first"
    plain, adapted = pair(batch_first=batch_first, bias=bias)
    given = inputs(kind, batch_first=batch_first, batched=layout != "unbatched")
    asked = {"need_weights": weights != "none", "average_attn_weights": weights != "heads"}
    # eval under no_grad sends the original through its fused kernel
    with torch.set_grad_enabled(training):
        assert_same(adapted.train(training)(*given, **asked), plain.train(training)(*given, **asked))


def causal(dtype: torch.dtype) -> Tensor:
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return hidden if dtype == torch.bool else torch.zeros(LENGTH, LENGTH).masked_fill(hidden, float("-inf"))


PADDING = torch.tensor([[False] * 4 + [True], [False] * 5])
PER_HEAD = torch.randn(BATCH * HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
MASKS: dict[str, dict[str, Any]] = {
    "bool": {"attn_mask": causal(torch.bool)},
    "float": {"attn_mask": causal(torch.float32)},
    "per-head": {"attn_mask": PER_HEAD},
    "padding": {"key_padding_mask": PADDING},
    "float-padding": {"key_padding_mask": torch.zeros(BATCH, LENGTH).masked_fill(PADDING, -1.5)},
    "both": {"attn_mask": causal(torch.bool), "key_padding_mask": PADDING},
    "per-head-and-padding": {"attn_mask": PER_HEAD > 1.0, "key_padding_mask": PADDING},
    "causal": {"attn_mask": causal(torch.bool), "is_causal": True},
    "causal-and-padding": {
        "attn_mask": causal(torch.float32),
        "key_padding_mask": PADDING.float() * -9.0,
        "is_causal": True,
    },
}


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no-weights"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "length-first"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_masks(masks: dict[str, Any], batch_first: bool, training: bool, need_weights: bool) -> None:
    plain, adapted = pair(batch_first=batch_first)
    given = inputs("self", batch_first=batch_first)
    arguments = {**masks, "need_weights": need_weights}
    expected = plain.train(training)(*given, **arguments)
    assert_same(adapted.train(training)(*given, **arguments), expected)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no-weights"])
def test_unbatched_masks(need_weights: bool) -> None:
    plain, adapted = pair()
    given = inputs("self", batched=False)
    arguments: dict[str, Any] = {
        "attn_mask": PER_HEAD[:HEADS],
        "key_padding_mask": torch.arange(LENGTH) * -1.0,
    }
    expected = plain(*given, **arguments, need_weights=need_weights)
    assert_same(adapted(*given, **arguments, need_weights=need_weights), expected)


@pytest.mark.parametrize("kind", ["self", "cross", "three"])
def test_the_update_is_that_of_the_merged_weights(kind: str) -> None:
    plain, adapted = pair()
    randomize_adapters(adapted)
    with torch.no_grad():
        plain.in_proj_weight.add_(adapted.scaling * adapted.lora_B @ adapted.lora_A)
        out = adapted.out_proj
        assert isinstance(out, LoRALinear)
        plain.out_proj.weight.add_(out.scaling * out.lora_B @ out.lora_A)
    given = inputs(kind)
    assert_same(adapted(*given), plain(*given))
    adapted.merge()
    assert_same(adapted(*given), plain(*given))


def test_gradients_reach_every_adapter_and_nothing_else() -> None:
    _, adapted = pair()
    # with B at zero the gradient of A is zero
    randomize_adapters(adapted)
    x = torch.randn(BATCH, LENGTH, EMBED)
    adapted(x, x, x, need_weights=False)[0].square().sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"lora_A", "lora_B", "out_proj.lora_A", "out_proj.lora_B"}
    assert adapted.lora_B.grad is not None
    # q, k and v each
    assert all(rows.any() for rows in adapted.lora_B.grad.chunk(3))


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no-weights"])
def test_attention_dropout(need_weights: bool) -> None:
    plain = nn.MultiheadAttention(EMBED, HEADS, dropout=0.5, batch_first=True)
    adapted = LoRAMultiheadAttention.from_attention(plain, rank=2)
    assert (adapted.dropout, adapted.lora_dropout) == (0.5, 0.0)
    x = torch.randn(64, LENGTH, EMBED)
    first, again = (adapted(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.equal(first, again)
    adapted.eval()
    torch.testing.assert_close(adapted(x, x, x)[0], plain.eval()(x, x, x)[0], rtol=1e-5, atol=1e-5)
    # half the weights fall away and the rest double: right on average
    adapted.train()
    runs = torch.stack([adapted(x, x, x, need_weights=need_weights)[0].detach() for _ in range(200)])
    noise = runs.std(dim=0).max() / 200**0.5
    torch.testing.assert_close(runs.mean(dim=0), adapted.eval()(x, x, x)[0], rtol=0, atol=6 * noise.item())


def test_lora_dropout_acts_in_training_only() -> None:
    _, adapted = pair(dropout=0.5)
    randomize_adapters(adapted)
    x = torch.randn(BATCH, LENGTH, EMBED)
    assert not torch.equal(adapted(x, x, x)[0], adapted(x, x, x)[0])
    adapted.eval()
    assert torch.equal(adapted(x, x, x)[0], adapted(x, x, x)[0])


def test_shares_parameters_and_names() -> None:
    plain = nn.MultiheadAttention(EMBED, HEADS).eval()
    adapted = LoRAMultiheadAttention.from_attention(plain, rank=2)
    assert isinstance(adapted, nn.MultiheadAttention)
    assert not adapted.training
    shared = dict(adapted.named_parameters())
    assert all(shared[name] is p and not p.requires_grad for name, p in plain.named_parameters())
    assert set(shared) - set(dict(plain.named_parameters())) == {
        "lora_A",
        "lora_B",
        "out_proj.lora_A",
        "out_proj.lora_B",
    }
    back = adapted.to_base()
    assert type(back) is nn.MultiheadAttention
    assert all(p is shared[name] for name, p in back.named_parameters())
    assert type(back.out_proj) is type(plain.out_proj)
    assert vars(back).keys() == vars(plain).keys()


def test_loads_the_originals_state_dict() -> None:
    plain, adapted = nn.MultiheadAttention(EMBED, HEADS), LoRAMultiheadAttention(EMBED, HEADS, rank=2)
    adapted.load_state_dict(plain.state_dict())
    given = inputs("self", batch_first=False)
    assert_same(adapted(*given), plain(*given))
    half = {**plain.state_dict(), "out_proj.lora_A": torch.zeros(2, EMBED)}
    with pytest.raises(RuntimeError, match=r"Missing key.*out_proj.lora_B"):
        adapted.load_state_dict(half)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_deepcopy_and_pickle(merged: bool) -> None:
    _, adapted = pair()
    randomize_adapters(adapted)
    if merged:
        adapted.merge()
    x = torch.randn(BATCH, LENGTH, EMBED)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert same_bits(twin(x, x, x)[0], adapted(x, x, x)[0])
        assert twin.merged is merged


def test_first_draw_is_each_layers_own() -> None:
    torch.manual_seed(0)
    adapted = LoRAMultiheadAttention.from_attention(nn.MultiheadAttention(EMBED, HEADS), rank=2)
    assert isinstance(adapted.out_proj, LoRALinear)
    assert not torch.equal(adapted.lora_A, adapted.out_proj.lora_A)
    assert (adapted.lora_A.shape, adapted.lora_B.shape) == ((2, EMBED), (3 * EMBED, 2))


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no-weights"])
def test_compiles_without_graph_break(need_weights: bool) -> None:
    torch.compiler.reset()
    _, adapted = pair()
    randomize_adapters(adapted)
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    x = torch.randn(BATCH, LENGTH, EMBED)
    arguments = {"attn_mask": causal(torch.bool), "need_weights": need_weights}
    assert_same(compiled(x, x, x, **arguments), adapted(x, x, x, **arguments))


def test_16_bits_and_autocast() -> None:
    plain, adapted = pair()
    randomize_adapters(adapted)
    x = torch.randn(BATCH, LENGTH, EMBED)
    expected = adapted(x, x, x, attn_mask=causal(torch.float32))[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = adapted(x, x, x, attn_mask=causal(torch.float32))[0]
        assert out.dtype == plain(x, x, x)[0].dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    low = adapted.bfloat16()(*[x.bfloat16()] * 3, attn_mask=causal(torch.float32))[0]
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.1)
