"""All that is used of modelopt without being public: the packed bytes of its NVFP4 quantizer."""

from __future__ import annotations

import functools

import torch

from dvdquant.system.hooks import lost_hook

__all__ = ["REQUIREMENT", "check_nvfp4", "nvfp4_bytes"]

REQUIREMENT = "nvidia-modelopt>=0.40,<0.50"

_WHY = "to pack NVFP4 weights"


@functools.cache
def check_nvfp4() -> None:
    """Refuse a modelopt that does not give its packed bytes, before any graph is lowered; one block is packed to see it.

    Raises:
        UnsupportedError: It does not, or has no such quantizer; with a release that does.
    """
    nvfp4_bytes(torch.ones(1, 16), 16, torch.tensor(1.0))


def nvfp4_bytes(weight: torch.Tensor, block: int, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packed e2m1 codes of a weight, uint8 [N, K/2], and the scales of its blocks, e4m3 [N, K/block].

    Args:
        weight: fp32 [N, K], with K a multiple of the block.
        block: Channels of a block.
        unit: The scale of the whole tensor, fp32 [].

    Raises:
        UnsupportedError: See :func:`check_nvfp4`.
    """
    try:
        from modelopt.torch.quantization.qtensor import NVFP4QTensor
    except ImportError as error:
        raise lost_hook("nvidia-modelopt", "torch.quantization.qtensor.NVFP4QTensor", _WHY, REQUIREMENT) from error
    quantized, scales, _ = NVFP4QTensor.quantize(weight, block, weights_scaling_factor_2=unit)
    codes = getattr(quantized, "_quantized_data", None)
    if codes is None:
        raise lost_hook("nvidia-modelopt", "NVFP4QTensor._quantized_data", _WHY, REQUIREMENT)
    return codes, scales
