"""How a session holds quantized weights on a GPU: packed, expanded or mixed, and what its log says of it."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from dvdquant.hardware.weights import WeightPolicy
from dvdquant.model.held_weights import held_weights
from dvdquant.model.weight_choice import WeightChoice, choose_weights, expand_named
from dvdquant.model.working_memory import step_bytes_at
from dvdquant.system.device_memory import device_memory
from dvdquant.text import amount, shown

if TYPE_CHECKING:
    import torch

    from dvdquant.deploy.sessions.base import EngineSession

__all__ = ["choose_form", "claim", "claimed_bytes"]

log = logging.getLogger(__name__)
_claims: weakref.WeakKeyDictionary[EngineSession, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def choose_form(
    session: EngineSession,
    sm: int,
    policy: WeightPolicy,
    *,
    shared: Sequence[int] | None = None,
    named: Collection[str] | None = None,
) -> WeightChoice:
    """Return how a session that is being opened holds its weights under a policy.

    Args:
        session: The session; its bits, sizes and device are known.
        sm: The compute capability, major · 10 + minor.
        policy: ``auto``, ``packed`` or ``expanded``.
        shared: Where engines with the TensorRT plugin hold the weights, the bytes of the inputs of each that are not quantized.
        named: The layers to expand, instead of a policy; None lets the policy say.
    """
    plugin = shared is not None
    held = held_weights(session.artifact.plan(session.component), sm, session.bits, session.sizes, shared)
    room = _room(session) if session.device.type == "cuda" else None
    choice = choose_weights(held, policy, room, plugin) if named is None else expand_named(held, named, plugin)
    if unknown := frozenset(named or ()) - {layer.name for layer in held.layers}:
        log.warning("%s: no quantized layer is named %s", session.component, ", ".join(map(shown, sorted(unknown)[:5])))
    log.info(
        "%s: weights are %s (%s)%s: %.2f GiB, %.0f %% of them expanded, and a step pays some %.1f %% for the others on SM %d.%d "
        "[modelled]; packed they would hold %s for %.1f %%, expanded %s",
        session.component,
        choice.form,
        policy if named is None else "named",
        " in the plugin" if plugin else "",
        choice.nbytes / 2**30,
        100 * choice.share,
        100 * choice.cost,
        *divmod(sm, 10),
        amount(held.nbytes("packed", plugin)),
        100 * held.cost,
        amount(held.nbytes("expanded", plugin)),
    )
    return choice


def _room(session: EngineSession) -> int:
    """Return the bytes of the GPU that weights may take: what is free and not claimed, less what a step works in."""
    family = session.artifact.family(session.component)
    free, _ = device_memory(session.device)
    taken = claimed_bytes(session.device) + step_bytes_at(family, session.sizes, session.sizes.at("opt"))
    return max(0, free - taken)


def claim(session: EngineSession, nbytes: int) -> None:
    """Note what a session will take of its device yet: weights are made in the first passes, and look free until then.

    Args:
        session: The session.
        nbytes: The bytes, instead of those that were noted before.
    """
    with _lock:
        _claims[session] = max(0, nbytes)


def claimed_bytes(device: torch.device) -> int:
    """Return the bytes of a device that open sessions of this process will take yet.

    Args:
        device: The device.
    """
    with _lock:
        open_ones = [(session.device, nbytes) for session, nbytes in _claims.items() if not session.closed]
    return sum(
        nbytes for other, nbytes in open_ones if (other.type, other.index or 0) == (device.type, device.index or 0)
    )
