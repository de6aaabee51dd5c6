"""How a session holds quantized weights on a GPU, packed or expanded, and what its log says of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from dvdquant.hardware.weights import WeightForm, WeightPolicy
from dvdquant.model.held_weights import HeldWeights, held_weights

if TYPE_CHECKING:
    from dvdquant.deploy.sessions.base import EngineSession

__all__ = ["choose_form"]

log = logging.getLogger(__name__)


def choose_form(
    session: EngineSession, sm: int, policy: WeightPolicy, *, plugin: bool = False
) -> tuple[WeightForm, HeldWeights]:
    """Return the form of a policy for a session that is being opened, with the bytes that it was chosen by.

    Args:
        session: The session; its bits, sizes and device are known.
        sm: The compute capability, major · 10 + minor.
        policy: ``auto``, ``packed`` or ``expanded``.
        plugin: Whether engines with the TensorRT plugin hold the weights.
    """
    held = held_weights(session.artifact.plan(session.component), sm, session.bits, session.sizes)
    room = torch.cuda.mem_get_info(session.device)[0] if session.device.type == "cuda" else None
    form = held.choose(policy, room, plugin)
    nbytes = held.plugin_bytes if plugin else held.nbytes
    log.info(
        "%s: weights are %s (%s)%s: packed they hold %.2f GiB and cost a step some %.1f %% on SM %d.%d [modelled], "
        "expanded %.2f GiB",
        session.component,
        form,
        policy,
        " in the plugin" if plugin else "",
        nbytes("packed") / 2**30,
        100 * held.cost,
        *divmod(sm, 10),
        nbytes("expanded") / 2**30,
    )
    return form, held
