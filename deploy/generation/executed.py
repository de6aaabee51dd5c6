"""What a trace and a summary say of what ran: backend, device and dtype."""

from __future__ import annotations

from typing import Any

import torch

from dvdquant.deploy.sessions import EngineSession
from dvdquant.deploy.sessions.options_text import attention_json

__all__ = ["executed_original", "executed_session"]


def executed_session(session: EngineSession) -> dict[str, Any]:
    """Return backend, device, dtype and resident bytes of a session, for trace and summary.

    Args:
        session: The session.
    """
    beside = [{"path": str(spec.path), "scale": spec.scale} for spec in session.loras]
    return {
        **({"lora": beside} if beside else {}),
        "backend": session.backend,
        **({"library": session.library} if session.library else {}),
        "device": str(session.device),
        "dtype": str(session.dtype).removeprefix("torch."),
        "activation_bits": list(session.bits),
        "resident_bytes": session.resident_bytes(),
        "attention": attention_json(session),
        "fused": session.fused,
    }


def executed_original(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a trace says of the original checkpoint: backend, device, dtype.

    Args:
        device: The device that PyTorch runs on.
        dtype: The dtype of the model.
    """
    name = str(dtype).removeprefix("torch.")
    return {"backend": "pytorch, original checkpoint", "device": str(device), "dtype": name}
