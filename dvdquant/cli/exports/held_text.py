"""What GPUs hold of an export's weights, packed and expanded, in words: for ``dvdq-inspect --weights`` and dry runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dvdquant.cli.shared.common import table
from dvdquant.hardware.capabilities import CAPABILITIES, sm_number
from dvdquant.text import amount, shown

if TYPE_CHECKING:
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.model.held_weights import HeldWeights
    from dvdquant.model.plan import ModelPlan
    from dvdquant.model.weight_choice import WeightChoice

__all__ = ["choice_text", "held_json", "held_text", "kept_json", "kept_text"]

KEPT = 6


def held_text(artifact: Artifact) -> str:
    """Return a table for each transformer, and its largest tensors in 16 bit.

    Args:
        artifact: The export.
    """
    from dvdquant.model.weight_choice import choose_weights

    parts = []
    for component in artifact.components:
        rows = []
        for sms, held in _by_gpu(artifact, component):
            cost = f"{100 * held.cost:.1f} %" if held.cost else "-"
            plugin = [amount(held.nbytes("packed", plugin=True)), amount(held.nbytes("expanded", plugin=True))]
            sizes = [amount(held.nbytes("packed")), amount(held.nbytes("expanded")), *plugin, amount(held.scratch)]
            rows.append((f"SM {', '.join(sms)}", *sizes, cost, choice_text(choose_weights(held, "auto"))))
        header = (
            component,
            "packed",
            "expanded",
            "plugin, packed",
            "expanded",
            "expands into",
            "cost of a step",
            "auto",
        )
        parts.append(table(header, rows, right=(1, 2, 3, 4, 5, 6)))
        parts.append(kept_text(artifact.plan(component)))
    widths = " and ".join(f"a{bits}" for bits in artifact.bits(artifact.components[0]))
    parts.append(
        f"device memory for the weights of {widths} together; expanding costs what two data-sheet figures of a GPU say, at the "
        "size that the export is tuned for [modelled, not measured]; auto: what is held where there is room, and what a step pays"
    )
    return "\n\n".join(parts)


def held_json(artifact: Artifact) -> dict[str, Any]:
    """Return the same as plain values: transformer -> SM -> bytes.

    Args:
        artifact: The export.
    """
    from dvdquant.model.weight_choice import choose_weights

    return {
        component: {
            sm: {
                "packed": held.nbytes("packed"),
                "expanded": held.nbytes("expanded"),
                "plugin_packed": held.nbytes("packed", plugin=True),
                "plugin_expanded": held.nbytes("expanded", plugin=True),
                "expands_into": held.scratch,
                "cost_of_a_step": round(held.cost, 4),
                **_auto_json(choose_weights(held, "auto")),
            }
            for sms, held in _by_gpu(artifact, component)
            for sm in sms
        }
        for component in artifact.components
    }


def choice_text(choice: WeightChoice) -> str:
    """Return how weights are held, in words: ``packed``, or the form with its bytes and what a step pays.

    Args:
        choice: How they are held.
    """
    if choice.form == "packed":
        return "packed"
    share = f"{100 * choice.share:.0f} % " if choice.form == "mixed" else ""
    return f"{share}expanded: {amount(choice.nbytes)}, {100 * choice.cost:.1f} %"


def _auto_json(choice: WeightChoice) -> dict[str, Any]:
    return {
        "auto": choice.form,
        "auto_bytes": choice.nbytes,
        "auto_expanded": round(choice.share, 4),
        "auto_cost_of_a_step": round(choice.cost, 4),
    }


def _by_gpu(artifact: Artifact, component: str) -> list[tuple[Sequence[str], HeldWeights]]:
    """Return what is held on each SM; those that differ in the modelled cost alone stand apart."""
    from dvdquant.model.held_weights import held_weights

    plan, bits = artifact.plan(component), artifact.bits(component)
    shared = artifact.kept_inputs(component, "tensorrt", bits) or None  # without engines, as they would be built now
    found: dict[HeldWeights, list[str]] = {}
    for sm, facts in CAPABILITIES.items():
        if facts.kernels and not facts.refused:
            held = held_weights(plan, sm_number(sm), bits, artifact.sizes, shared)
            found.setdefault(held, []).append(sm)
    return [(sms, held) for held, sms in found.items()]


def kept_text(plan: ModelPlan, of: str = "") -> str:
    """Return a table of the tensors that stay in 16 or 32 bit, the largest by name.

    Args:
        plan: The plan of a transformer.
        of: Its name, where the table does not stand below it.
    """
    from dvdquant.model.held_weights import largest_kept

    everything = largest_kept(plan, None)
    total = sum(tensor.nbytes for tensor in everything)
    rows = [(shown(t.name), "×".join(map(str, t.shape)), amount(t.nbytes)) for t in everything[:KEPT]]
    rest = everything[KEPT:]
    if rest:
        rows.append(
            (
                f"{len(rest)} others",
                f"{sum(math.prod(t.shape) for t in rest):,} numbers",
                amount(sum(t.nbytes for t in rest)),
            )
        )
    return table((f"{of and f'{of}, '}not quantized: {amount(total)}", "shape", "size"), rows, right=(2,))


def kept_json(plan: ModelPlan) -> list[dict[str, Any]]:
    """Return the same tensors as plain values, without a sum of the others.

    Args:
        plan: The plan of a transformer.
    """
    from dvdquant.model.held_weights import largest_kept

    return [{"name": t.name, "shape": list(t.shape), "bytes": t.nbytes} for t in largest_kept(plan, KEPT)]
