"""The dtypes of activations and of tensors that stay in 16 bit, by the names that options and manifests use."""

from __future__ import annotations

import torch

__all__ = ["DTYPES"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
