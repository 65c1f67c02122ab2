"""Soft prompts: what they compute in encoders and decoders of Hugging Face, and what they refuse."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.inject.prompts import apply_prompts
from tests.cases import cases
from tests.prompt_models import TEXT_KINDS, TOKENS, main_output, prompts_of, text_model

KINDS = pytest.mark.parametrize("kind", TEXT_KINDS)
# RoBERTa pads with word 1
IDS = torch.tensor([[2, 7, 9, 4, 11, 3], [2, 8, 3, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
ROBERTA_POSITIONS = torch.tensor([[2, 3, 4, 5, 6, 7], [2, 3, 4, 1, 1, 1]])


def amid(x: Tensor, new: Tensor, after: int = 1) -> Tensor:
    return torch.cat([x[:, :after], new, x[:, after:]], dim=1)


def encoder_by_hand(plain: Any, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    """The plain encoder on [first word, prompts, other words], each word at the position it has alone."""
    words = plain.get_input_embeddings()(IDS)
    first = positions[:, :1].repeat(1, TOKENS)
    if mask is not None:
        mask = amid(mask, mask.new_ones(len(mask), TOKENS))
    hidden = plain(
        inputs_embeds=amid(words, tokens.repeat(len(IDS), 1, 1)),
        attention_mask=mask,
        position_ids=amid(positions, first),
    ).last_hidden_state
    return torch.cat([hidden[:, :1], hidden[:, 1 + TOKENS :]], dim=1)


def prompted_and_plain(kind: str, **settings: Any) -> tuple[Any, Any]:
    model = text_model(kind, **settings).double().eval()
    return apply_prompts(copy.deepcopy(model), num_tokens=TOKENS), model


@KINDS
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_an_encoder_reads_prompts_after_its_first_word(kind: str, masked: bool) -> None:
    model, plain = prompted_and_plain(kind)
    mask = MASK if masked else None
    positions = ROBERTA_POSITIONS if kind == "roberta" else torch.arange(6).unsqueeze(0)
    expected = encoder_by_hand(plain, prompts_of(model).tokens, positions, mask)
    out = model(IDS, attention_mask=mask)
    torch.testing.assert_close(out.last_hidden_state, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(expected, plain(IDS, attention_mask=mask).last_hidden_state)
    if "pooler_output" in out:
        torch.testing.assert_close(out.pooler_output, plain.pooler(expected), rtol=1e-10, atol=1e-12)


def test_every_way_to_call_an_encoder_agrees() -> None:
    model, _ = prompted_and_plain("bert")
    types, positions = torch.zeros_like(IDS), torch.arange(6).expand(2, -1)
    expected = model(IDS, MASK).last_hidden_state
    embedded = model.get_input_embeddings()(IDS)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((IDS, MASK, types, positions), {}),
        ((), {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": types}),
        ((), {"input_ids": IDS, "attention_mask": MASK.bool(), "position_ids": positions[:1]}),
        ((), {"inputs_embeds": embedded, "attention_mask": MASK.double()}),
        ((IDS, MASK), {"return_dict": False}),
        ((None, MASK, None, None, embedded), {"output_hidden_states": True}),
    ]
    for args, kwargs in calls:
        assert torch.equal(model(*args, **kwargs)[0], expected)


def test_the_second_text_keeps_its_type() -> None:
    model, plain = prompted_and_plain("bert")
    types = torch.tensor([[0, 0, 1, 1, 1, 1]]).expand(2, -1)
    words = plain.get_input_embeddings()(IDS)
    hidden = plain(
        inputs_embeds=amid(words, prompts_of(model).tokens.repeat(2, 1, 1)),
        token_type_ids=amid(types, types.new_zeros(2, TOKENS)),
        position_ids=amid(torch.arange(6).unsqueeze(0), torch.zeros(1, TOKENS, dtype=torch.long)),
    ).last_hidden_state
    out = model(IDS, token_type_ids=types).last_hidden_state
    torch.testing.assert_close(out, amid(hidden[:, :1], hidden[:, 1 + TOKENS :]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [*TEXT_KINDS, "llama"])
def test_shapes_are_those_of_the_plain_model(kind: str) -> None:
    model, plain = prompted_and_plain(kind)
    for ids in (IDS, IDS[:1], IDS[:, :1]):
        out, expected = (m(ids, output_hidden_states=True, use_cache=False) for m in (model, plain))
        assert list(out) == list(expected)
        assert out[0].shape == expected[0].shape
        assert [h.shape for h in out.hidden_states] == [h.shape for h in expected.hidden_states]
        as_tuple = model(ids, output_hidden_states=True, return_dict=False)
        assert [h.shape for h in as_tuple[-1]] == [h.shape for h in expected.hidden_states]
    # an encoder's first hidden state is its embedded text, the very one it has without prompts
    if kind != "llama":
        torch.testing.assert_close(
            model(IDS, output_hidden_states=True).hidden_states[0],
            plain(IDS, output_hidden_states=True).hidden_states[0],
        )


@KINDS
def test_padding_changes_no_other_row(kind: str) -> None:
    model, _ = prompted_and_plain(kind, pad_token_id=1)
    alone = model(IDS[1:, :3]).last_hidden_state
    padded = model(IDS, attention_mask=MASK).last_hidden_state[1:, :3]
    torch.testing.assert_close(padded, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [*TEXT_KINDS, "bert-classifier", "bert-masked", "llama"])
def test_every_prompt_gets_a_gradient_and_nothing_else_does(kind: str) -> None:
    model: Any = apply_prompts(text_model(kind), num_tokens=TOKENS, dropout=0.1)
    main_output(model(IDS, attention_mask=MASK)).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ((name, gradient),) = gradients.items()
    assert name.endswith("prompts.tokens")
    assert gradient.shape == (1, TOKENS, 8)
    assert gradient.abs().sum(-1).gt(0).all()


def test_a_classifier_trains_with_labels() -> None:
    model: Any = apply_prompts(text_model("bert-classifier"), num_tokens=3, modules_to_save=["classifier"])
    # weights as small as transformers draws them let nothing through to the head
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.dim() == 2 else 1)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"bert.prompts.tokens", "classifier.weight", "classifier.bias"}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = model(IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_a_decoder_reads_prompts_before_its_text() -> None:
    model, plain = prompted_and_plain("llama")
    tokens = prompts_of(model).tokens
    embedded = torch.cat([tokens.repeat(2, 1, 1), plain.get_input_embeddings()(IDS)], dim=1)
    mask = torch.cat([torch.ones(2, TOKENS, dtype=torch.long), MASK], dim=1)
    expected = plain(inputs_embeds=embedded, attention_mask=mask).logits[:, TOKENS:]
    out = model(IDS, attention_mask=MASK, labels=IDS)
    torch.testing.assert_close(out.logits, expected, rtol=1e-10, atol=1e-12)
    loss = F.cross_entropy(expected[:, :-1].float().flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(out.loss, loss)
    assert out.past_key_values is None
    torch.testing.assert_close(model(IDS, MASK, torch.arange(6).unsqueeze(0)).logits, expected)
    torch.testing.assert_close(model(IDS, MASK, logits_to_keep=1).logits, expected[:, -1:])


def test_padding_to_the_left_leaves_a_decoder_as_it_is() -> None:
    model, _ = prompted_and_plain("llama")
    ids, mask = torch.cat([IDS[:1, :2] * 0, IDS[:1]], dim=1), F.pad(MASK[:1], (2, 0))
    padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(padded.logits[:, 2:], model(IDS[:1]).logits, rtol=1e-10, atol=1e-12)


def test_a_decoder_generates_without_a_cache_and_refuses_one() -> None:
    model, _ = prompted_and_plain("llama", eos_token_id=None)
    ids = IDS[:1]
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, ids)
    with pytest.raises(ValueError, match=r"expected a call without a key-value cache.*use_cache=False"):
        model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="expected a call without a key-value cache"):
        model(IDS, use_cache=True)


def test_prompts_start_as_different_words() -> None:
    model = apply_prompts(text_model("roberta"), num_tokens=20)
    table = model.get_parameter("embeddings.word_embeddings.weight")
    distances = (prompts_of(model).tokens[0].unsqueeze(1) - table).abs().sum(-1)
    words = distances.argmin(1)
    assert not distances.min(1).values.any()
    assert len(set(words.tolist())) == 20
    assert 1 not in words


def test_uniform_prompts_spread_as_the_vocabulary() -> None:
    model = apply_prompts(text_model("bert"), num_tokens=2000, init="uniform")
    tokens, table = prompts_of(model).tokens, model.get_parameter("embeddings.word_embeddings.weight")
    assert abs(tokens.std() / table.std() - 1) < 0.05
    assert len(tokens[0].unique(dim=0)) == 2000


def test_the_vocabulary_itself_is_not_changed_by_training_prompts() -> None:
    model = apply_prompts(text_model("bert"), num_tokens=3)
    table = model.get_parameter("embeddings.word_embeddings.weight").clone()
    with torch.no_grad():
        prompts_of(model).tokens.zero_()
    assert torch.equal(model.get_parameter("embeddings.word_embeddings.weight"), table)


@KINDS
def test_text_may_be_as_long_as_before_and_no_longer(kind: str) -> None:
    model, _ = prompted_and_plain(kind)
    assert model(torch.full((1, 12), 5)).last_hidden_state.shape == (1, 12, 8)
    with pytest.raises(ValueError, match=r"expected at most 12 tokens of text.*got 13; truncate the text"):
        model(torch.full((1, 13), 5))
    with pytest.raises(ValueError, match=r"expected at most 12 tokens of text.*got 13"):
        model(inputs_embeds=torch.zeros(1, 13, 8, dtype=torch.float64))


def test_what_prompts_cannot_extend_is_refused() -> None:
    model, _ = prompted_and_plain("bert")
    with pytest.raises(ValueError, match=r"expected attention_mask as \[batch, length\].*\(2, 1, 6, 6\)"):
        model(IDS, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match=r"expected no bbox, got Tensor of shape \(2, 6, 4\)"):
        model(IDS, bbox=torch.zeros(2, 6, 4))
    # the model's own complaints stay its own
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    with pytest.raises(TypeError):
        model(IDS, *[None] * 20)


@pytest.mark.parametrize("kind", cases(["bert"], [*(kind for kind in TEXT_KINDS if kind != "bert"), "llama"]))
def test_compiles_without_graph_break(kind: str) -> None:
    torch.compiler.reset()
    model = apply_prompts(text_model(kind), num_tokens=TOKENS).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = prompts_of(model).tokens
    for mask in (None, MASK):
        out, expected = compiled(IDS, attention_mask=mask)[0], model(IDS, attention_mask=mask)[0]
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.square().sum(), tokens),
            torch.autograd.grad(expected.square().sum(), tokens),
        )


@pytest.mark.parametrize("kind", [*TEXT_KINDS, "llama"])
def test_activation_checkpointing_changes_no_gradient(kind: str) -> None:
    model: Any = apply_prompts(text_model(kind), num_tokens=TOKENS, dropout=0.5)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            # renamed in transformers 5
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(0)
        main_output(model(IDS, attention_mask=MASK)).square().sum().backward()
        gradient = prompts_of(model).tokens.grad
        assert gradient is not None
        gradients.append(gradient)
        prompts_of(model).tokens.grad = None
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", [*TEXT_KINDS, "llama"])
def test_16_bits(kind: str) -> None:
    model = apply_prompts(text_model(kind).bfloat16(), num_tokens=TOKENS).eval()
    tokens = prompts_of(model).tokens
    assert tokens.dtype == torch.float32
    out = model(IDS, attention_mask=MASK)[0]
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.float().square().sum(), tokens)[0].dtype == torch.float32
    expected = model.float()(IDS, attention_mask=MASK)[0]
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(IDS, attention_mask=MASK)[0].float(), expected, rtol=0.1, atol=0.1)


def test_dropout_acts_in_training_only() -> None:
    plain = text_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = apply_prompts(plain.train(), num_tokens=TOKENS, dropout=0.5)
    ids = IDS[:1].expand(2, -1)
    first, second = model(ids)[0]
    assert not torch.allclose(first, second)
    first, second = model.eval()(ids)[0]
    torch.testing.assert_close(first, second)


def test_padding_on_the_left_changes_nothing_in_a_decoder() -> None:
    """The prompts and the text keep their distance, however much padding stands before the text."""
    model, _ = prompted_and_plain("llama", num_tokens=3)
    ids = torch.randint(5, 20, (1, 6))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    expected = model(ids).logits
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], expected)
