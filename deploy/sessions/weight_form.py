"""How a session holds quantized weights on a GPU: packed, expanded or mixed, and what its log says of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dvdquant.hardware.weights import WeightPolicy
from dvdquant.model.held_weights import held_weights
from dvdquant.model.weight_choice import WeightChoice, choose_weights
from dvdquant.model.working_memory import step_bytes_at
from dvdquant.system.device_memory import device_memory
from dvdquant.text import amount

if TYPE_CHECKING:
    from dvdquant.deploy.sessions.base import EngineSession

__all__ = ["choose_form"]

log = logging.getLogger(__name__)


def choose_form(
    session: EngineSession, sm: int, policy: WeightPolicy, *, shared: Sequence[int] | None = None
) -> WeightChoice:
    """Return how a session that is being opened holds its weights under a policy.

    Args:
        session: The session; its bits, sizes and device are known.
        sm: The compute capability, major · 10 + minor.
        policy: ``auto``, ``packed`` or ``expanded``.
        shared: Where engines with the TensorRT plugin hold the weights, the bytes of the inputs of each that are not quantized.
    """
    plugin = shared is not None
    held = held_weights(session.artifact.plan(session.component), sm, session.bits, session.sizes, shared)
    room = _room(session) if session.device.type == "cuda" else None
    choice = choose_weights(held, policy, room, plugin)
    nbytes = held.plugin_bytes if plugin else held.nbytes
    log.info(
        "%s: weights are %s (%s)%s: %.2f GiB, %.0f %% of them expanded, and a step pays some %.1f %% for the others on SM %d.%d "
        "[modelled]; packed they would hold %s for %.1f %%, expanded %s",
        session.component,
        choice.form,
        policy,
        " in the plugin" if plugin else "",
        choice.nbytes / 2**30,
        100 * choice.share,
        100 * choice.cost,
        *divmod(sm, 10),
        amount(nbytes("packed")),
        100 * held.cost,
        amount(nbytes("expanded")),
    )
    return choice


def _room(session: EngineSession) -> int:
    """Return the bytes of the GPU that weights may take: what is free, less what a step works in."""
    family = session.artifact.family(session.component)
    free, _ = device_memory(session.device)
    return max(0, free - step_bytes_at(family, session.sizes, session.sizes.at("opt")))
