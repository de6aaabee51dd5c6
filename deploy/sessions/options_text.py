"""What the options of a session lead to, in words: its attention and its CUDA graphs, before it is opened and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dvdquant.deploy.sessions.base import ENGINES
from dvdquant.system.devices import cuda_sm
from dvdquant.text import shown

if TYPE_CHECKING:
    import torch

    from dvdquant.artifact.entries import EngineEntry
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.sessions.base import EngineSession

__all__ = ["attention_json", "attention_text", "built_text", "graphs_text"]

_AS_BUILT = "as built"


def attention_text(
    artifact: Artifact, backend: str, device: torch.device, attention: str | None, library: str | None
) -> str | None:
    """Return in words which attention sessions will have, before they are opened; None where nothing asks for 8 bits.

    Args:
        artifact: The export.
        backend: The full name of the backend that runs.
        device: The device of the sessions.
        attention: ``16``, ``int8`` or ``fp8``; None is the recipe's.
        library: The library that was asked for, or None.

    Raises:
        UnsupportedError: The library is not possible here.
    """
    wanted = attention or artifact.recipe.attention
    if wanted == artifact.recipe.attention == "16" and library is None:
        return None
    if backend in ENGINES:
        names = [(name, width) for name in artifact.components for width in artifact.bits(name)]
        entries = [entry for name, width in names for entry in artifact.engines(name, backend, width)]
        return f"attention: what the engines were built with: {built_text(_for_device(entries, device))}"
    if backend != "pytorch":
        return f"attention: 16 bit{'' if wanted == '16' else f', not {wanted}: only PyTorch sessions have it'}"
    # PyTorch: what the session will try.
    from dvdquant.deploy.sessions.pytorch import wanted_attention
    from dvdquant.ops.attention.ladder import MIN_TOKENS
    from dvdquant.ops.attention.libraries import cards_text

    chosen = wanted_attention(wanted, library, device, artifact.components[0])
    if chosen is None:
        return "attention: 16 bit"
    tokens = _most_tokens(artifact) + artifact.sizes.text_tokens
    if tokens < MIN_TOKENS:
        return f"attention: 16 bit, not {wanted}: video and text are {tokens} tokens, of {MIN_TOKENS} that it is for"
    reasons = {each.name: each.refused(chosen.sm) for each in chosen.rungs}
    tried = [name for name, reason in reasons.items() if reason is None]
    missing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
    if chosen.sm is None and not reasons:
        return f"attention: 16 bit, not {wanted}: no library has it on a CPU; on a GPU {'; '.join(cards_text(wanted))}"
    if not tried:
        return f"attention: 16 bit, not {wanted}: {missing or f'no library has it on SM {(chosen.sm or 0) / 10}'}"
    right = "right and faster than 16 bit" if chosen.must_be_faster else "right"
    how = f"the first of {', '.join(tried)} that is {right}" if len(tried) > 1 else f"{tried[0]}, if it is {right}"
    left_out = f"; not {missing}" if missing else ""
    return f"attention of {MIN_TOKENS} tokens or more: {wanted}, by {how} on the first layer, else 16 bit{left_out}"


def graphs_text(artifact: Artifact, backend: str, device: torch.device) -> str:
    """Return in words whether sessions repeat steps as CUDA graphs, which they were asked for, before they are opened.

    Args:
        artifact: The export.
        backend: The full name of the backend that runs.
        device: The device of the sessions.
    """
    from dvdquant.deploy.sessions.replay import why_not

    why = None
    if backend == "pytorch":
        why = why_not(device, artifact.sizes.dynamic, _most_tokens(artifact) * artifact.sizes.batch)
    elif backend not in ENGINES:
        why = "ONNX Runtime has none"
    return f"steps repeated as CUDA graphs: {'yes, from the second one on' if why is None else f'no, {why}'}"


def _most_tokens(artifact: Artifact) -> int:
    """Return the tokens of the longest video that an export serves.

    Args:
        artifact: The export.
    """
    return artifact.family(artifact.components[0]).tokens(*artifact.sizes.at("max"))


def attention_json(session: EngineSession) -> Any:
    """Return a session's attention as plain values: ``16``, ``as built`` of engines, or what was wanted and what runs.

    Args:
        session: The session.
    """
    if session.backend in ENGINES:
        return _AS_BUILT
    return "16" if session.attention is None else session.attention.to_json()


def built_text(entries: Sequence[EngineEntry]) -> str:
    """Return what engines execute, in the words of their builder, each once.

    Args:
        entries: The manifest's entries of the engines.
    """
    return shown("; ".join(dict.fromkeys(f"a{entry['act_bits']}: {entry['executes']}" for entry in entries)), 1000)


def _for_device(entries: Sequence[EngineEntry], device: torch.device) -> list[EngineEntry]:
    """Return the engines for a GPU; all of them where the device is none."""
    if device.type != "cuda":
        return list(entries)
    sm = "{}.{}".format(*divmod(cuda_sm(device), 10))
    return [entry for entry in entries if sm in entry["sm"]]
