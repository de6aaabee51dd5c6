"""Text encoders with little memory: weights in 8 bits, and memory that is given back once they are done."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from dvdquant.errors import UnsupportedError

__all__ = ["TEXT_BITS", "can_quantize_text", "check_text_bits", "eight_bit_text", "release_memory"]

TEXT_BITS = (16, 8)


def can_quantize_text() -> bool:
    """Return whether torchao is installed, which a text encoder in 8 bits needs."""
    return importlib.util.find_spec("torchao") is not None


def check_text_bits(bits: int) -> None:
    """Refuse bits that the weights of a text encoder cannot have here, before anything is loaded.

    Args:
        bits: Bits of the weights.

    Raises:
        UnsupportedError: They are neither 16 nor 8, or torchao is not installed.
    """
    if bits not in TEXT_BITS:
        raise UnsupportedError(f"a text encoder in {bits} bits", available=[str(each) for each in TEXT_BITS])
    if bits == 8 and not can_quantize_text():
        raise UnsupportedError(
            "a text encoder in 8 bits needs torchao, which is not installed",
            fix="leave --text-encoder-bits out, or pip install 'dvdquant[text-int8]'",
        )


def eight_bit_text(encoders: Sequence[str]) -> Any:
    """Return the configuration with which a pipeline loads text encoders in 8 bits, tensor by tensor.

    The weights of linear layers become int8 with a scale per row (torchao); embeddings stay in 16 bit.

    Args:
        encoders: The names of the text encoders in the pipeline.

    Raises:
        UnsupportedError: torchao is missing, or it does not fit the other libraries.
    """
    check_text_bits(8)
    try:
        from diffusers import PipelineQuantizationConfig
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        each = {name: TorchAoConfig(Int8WeightOnlyConfig()) for name in encoders}
        return PipelineQuantizationConfig(quant_mapping=each)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedError(
            f"torchao does not work with the libraries that are installed: {str(error).strip():.300}",
            fix="leave --text-encoder-bits out, or upgrade: pip install 'dvdquant[text-int8]'",
        ) from error


def release_memory(device: torch.device) -> None:
    """Give the memory of freed parts back to the device.

    Args:
        device: The device.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
