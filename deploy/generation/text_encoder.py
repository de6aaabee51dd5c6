"""Text encoders with little memory: weights in 8 or 4 bits, and memory that is given back once they are done."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from dvdquant.deploy.generation.text_four_bits import four_bit_config
from dvdquant.deploy.generation.transformers_hooks import REQUIREMENT, check_packing_hooks
from dvdquant.errors import UnsupportedError
from dvdquant.system.versions import installed_versions

__all__ = ["TEXT_BITS", "check_text_bits", "narrow_text", "release_memory", "usable_text_bits"]

TEXT_BITS = (16, 8, 4)


def usable_text_bits() -> tuple[int, ...]:
    """Return the bits that the weights of a text encoder can have here: 8 need torchao."""
    there = importlib.util.find_spec("torchao") is not None
    return tuple(bits for bits in TEXT_BITS if bits != 8 or there)


def check_text_bits(bits: int) -> None:
    """Refuse bits that the weights of a text encoder cannot have here, before anything is loaded.

    Args:
        bits: Bits of the weights.

    Raises:
        UnsupportedError: They are not one of :data:`TEXT_BITS`, torchao is not installed for 8, or transformers packs
            weights in another way than we know for 4.
    """
    if bits not in TEXT_BITS:
        raise UnsupportedError(f"a text encoder in {bits} bits", available=[str(each) for each in TEXT_BITS])
    if bits not in usable_text_bits():
        raise UnsupportedError(
            "a text encoder in 8 bits needs torchao, which is not installed",
            available=[str(each) for each in usable_text_bits()],
            fix="take --text-encoder-bits 4, or pip install 'dvdquant[text-int8]'",
        )
    if bits == 4:
        check_packing_hooks()


def narrow_text(encoders: Sequence[str], bits: int) -> Any:
    """Return the configuration with which a pipeline loads text encoders in few bits, tensor by tensor.

    In 8 bits the weights of linear layers become int8 with a scale per row (torchao), in 4 bits see :mod:`.text_four_bits`.
    Embeddings stay in 16 bit.

    Args:
        encoders: The names of the text encoders in the pipeline.
        bits: Bits of their weights, 8 or 4.

    Raises:
        UnsupportedError: Torchao is missing, or it or transformers does not fit the other libraries.
    """
    check_text_bits(bits)
    try:
        from diffusers import PipelineQuantizationConfig

        each = {name: _eight_bit_config() if bits == 8 else four_bit_config() for name in encoders}
        return PipelineQuantizationConfig(quant_mapping=each)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        library, package = ("torchao", "dvdquant[text-int8]") if bits == 8 else ("transformers", REQUIREMENT)
        version = installed_versions(library).get(library, "of unknown version")
        raise UnsupportedError(
            f"{library} {version} does not work with the libraries that are installed: {str(error).strip():.300}",
            fix=f"leave --text-encoder-bits out, or install another release: pip install -U '{package}'",
        ) from error


def _eight_bit_config() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def release_memory(device: torch.device) -> None:
    """Give the memory of freed parts back to the device.

    Args:
        device: The device.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
