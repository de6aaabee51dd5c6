"""The dtypes of activations and of tensors that stay in 16 bit, by the names that options and manifests use; limits of fp8."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "E4M3_MAX"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
"""The largest number of e4m3, 448."""
