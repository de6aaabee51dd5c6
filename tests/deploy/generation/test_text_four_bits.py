"""Text encoders in 4 bits: layers against their definition, and models of every kind as transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dvdquant.deploy.generation import text_four_bits
from dvdquant.deploy.generation.memory_plan import four_bit_bytes
from dvdquant.deploy.generation.text_four_bits import FourBitLinear, four_bit_config, pack
from dvdquant.errors import CheckpointError

CPU = torch.device("cpu")


def models() -> dict[str, tuple[Any, Any]]:
    """(class, config) of what the families' pipelines encode text with, tiny."""
    import transformers as t

    shared: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 200}
    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, **shared}
    five: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 200}
    five["feed_forward_proj"] = "gated-gelu"
    return {
        "umt5": (t.UMT5EncoderModel, t.UMT5Config(**five)),
        "t5": (t.T5EncoderModel, t.T5Config(**five)),
        "llama": (t.LlamaModel, t.LlamaConfig(num_key_value_heads=2, **wide)),
        "clip": (t.CLIPTextModel, t.CLIPTextConfig(eos_token_id=2, bos_token_id=0, pad_token_id=1, **wide)),
    }


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_multiplies_its_dequantized_weight(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part by part, the last one smaller; every weight within a step of its group's grid."""
    torch.manual_seed(0)
    weight, x = torch.randn(37, 96) * torch.rand(37, 1), torch.randn(2, 5, 96)
    layer = FourBitLinear(96, 37, bias, torch.float32, CPU)
    layer.weight.data = pack(weight)
    if layer.bias is not None:
        layer.bias.data = torch.randn(37)
    assert layer.weight.shape == (37, four_bit_bytes(96, 1))
    held = layer.dequantized()
    groups = weight.reshape(37, 3, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    # A factor in 255ths of the row's scale, and a zero-point in 16ths, move the grid by less than a step.
    assert bool(((held - weight).reshape(37, 3, 32).abs() <= 1.1 * step[..., None]).all())
    assert float((held - weight).norm() / weight.norm()) < 0.1
    wanted = nn.functional.linear(x.double(), held.double(), None if layer.bias is None else layer.bias.double())
    monkeypatch.setattr(text_four_bits, "EXPANDED_AT_ONCE", 8 * 96)
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["umt5", "t5", "llama", "clip"])
def test_a_model_is_loaded_with_every_linear_layer_packed(name: str, tmp_path: Path) -> None:
    """Its outputs are those of the model whose weights are the dequantized ones, to the last bit."""
    made, config = models()[name]
    torch.manual_seed(0)
    made(config).to(torch.bfloat16).save_pretrained(tmp_path)
    plain = made.from_pretrained(tmp_path, dtype=torch.bfloat16)
    packed = made.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=four_bit_config())
    ids = torch.randint(0, 200, (1, 9))
    with torch.inference_mode():
        before = plain(ids)[0].float()
        for place, module in list(plain.named_modules()):
            if isinstance(module, nn.Linear):
                other = packed.get_submodule(place)
                assert isinstance(other, FourBitLinear), place
                module.weight.data = other.dequantized().to(torch.bfloat16)
        ours = packed(ids)[0].float()
        assert torch.equal(ours, plain(ids)[0].float())
    assert 0 < float((ours - before).norm() / before.norm()) < 0.3
    assert {p.device.type for p in packed.parameters()} == {"cpu"}


def test_a_weight_with_nan_is_refused() -> None:
    with pytest.raises(CheckpointError, match="non-finite"):
        pack(torch.full((4, 32), float("nan")))
