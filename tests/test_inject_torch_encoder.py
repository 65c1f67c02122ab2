"""nn.TransformerEncoder, whose fused inference path would skip the adapters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from tests.lora_models import randomize_adapters


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("targets", [["linear1"], ["self_attn"], "all-linear"], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
def test_torchs_fused_encoder_does_not_skip_the_adapters(targets: Any, padded: bool) -> None:
    """Under eval() and no_grad() nn.TransformerEncoderLayer reads weights and calls no layer."""
    torch.manual_seed(0)
    model = encoder().eval()
    x = torch.randn(3, 6, 8)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 6]) if padded else None

    def run() -> Tensor:
        # what is padded may differ between the two paths
        out = model(x, src_key_padding_mask=padding)
        assert isinstance(out, Tensor)
        return out if padding is None else out.masked_fill(padding[..., None], 0.0)

    with torch.no_grad():
        plain = run()
        fastlora.apply_lora(model, target_modules=targets, rank=2, alpha=2)
        torch.testing.assert_close(run(), plain, rtol=1e-5, atol=1e-5)
        randomize_adapters(model)
        fused_or_not = run()
    assert not torch.allclose(fused_or_not, plain, atol=1e-2)
    # with gradients torch takes the plain path, which calls every layer
    torch.testing.assert_close(fused_or_not, run().detach(), rtol=1e-5, atol=1e-5)
    fastlora.remove_adapters(model)
    fresh = encoder()
    assert {name: vars(m).keys() for name, m in model.named_modules()} == {
        name: vars(m).keys() for name, m in fresh.named_modules()
    }
    first = model.layers[0]
    assert isinstance(first, nn.TransformerEncoderLayer)
    assert first.activation_relu_or_gelu == 1
    assert model.use_nested_tensor is fresh.use_nested_tensor


def test_untouched_encoder_layers_keep_the_fused_path() -> None:
    model = encoder()
    fastlora.apply_lora(model, target_modules=["layers.1.linear1"], rank=2)
    assert [getattr(layer, "activation_relu_or_gelu") for layer in model.layers] == [1, 0]  # noqa: B009
