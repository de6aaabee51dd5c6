"""Whether an engine's self-attention runs in FP8, and in words why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dvdquant.model.families import Family, Sizes
    from dvdquant.recipe import Recipe

__all__ = ["FP8_SMS", "SIXTEEN_BIT", "AttentionWish", "attention_wish"]

FP8_SMS: tuple[str, ...] = ("8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")
"""SMs with FP8 tensor cores."""


@dataclass(frozen=True)
class AttentionWish:
    """The wishes of an export for the self-attention of its engines.

    Args:
        kind: ``16``, ``int8`` or ``fp8``.
        obstacle: Why this model's attention stays in 16 bit in engines; empty where nothing is in the way.
    """

    kind: str = "16"
    obstacle: str = ""

    def on(self, sms: Sequence[str]) -> Literal["16", "fp8"]:
        """Return how attention runs in one engine for these SMs.

        Args:
            sms: The compute capabilities of the engine.
        """
        wanted = self.kind != "16" and not self.obstacle and all(sm in FP8_SMS for sm in sms)
        return "fp8" if wanted else "16"

    def words(self, sms: Sequence[str]) -> str:
        """Return the same in plain words, for the manifest and the dry run; nothing where 16 bit was asked for.

        Args:
            sms: The compute capabilities of the engine.
        """
        if self.kind == "16":
            return ""
        if self.on(sms) == "fp8":
            words = "; self-attention in FP8 (e4m3, q and k rotated, static scales)"
            return words + (", because INT8 attention would write its scores to memory" if self.kind == "int8" else "")
        without = [sm for sm in sms if sm not in FP8_SMS]
        return "; self-attention in 16 bit: " + (self.obstacle or f"SM {', '.join(without)} has no FP8 tensor cores")


SIXTEEN_BIT = AttentionWish()


def attention_wish(recipe: Recipe, family: Family, sizes: Sizes) -> AttentionWish:
    """Return what ``recipe`` asks of this model at these sizes.

    Args:
        recipe: The recipe of the export.
        family: The model family.
        sizes: The sizes of the export, in latent units.
    """
    # Not at import: it brings PyTorch, which the table of precisions does without.
    from dvdquant.export.passes.fp8_attention import LONG_TOKENS

    kind = recipe.attention
    tokens = family.tokens(*sizes.at("max"))
    if tokens <= LONG_TOKENS:
        return AttentionWish(kind, f"a video of {tokens} tokens is short")
    return AttentionWish(kind, _obstacle(family))


def _obstacle(family: Family) -> str:
    """Return why the attention of a family cannot have static scales."""
    if family.config.get("qk_norm", "default") is None:
        return "this model has no norms of q and k, which the static scales follow from"
    return ""
