"""The options of commands whose sessions can compute attention in 8 bits."""

from __future__ import annotations

from collections.abc import Callable

import click

from dvdquant.cli.shared.common import P, R
from dvdquant.cli.shared.paths import WORD
from dvdquant.ops.attention.libraries import check_library
from dvdquant.recipe import ATTENTION

__all__ = ["takes_attention"]


def _known_library(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse a name that no library of attention has, before PyTorch is loaded."""
    if value is not None:
        check_library(value)
    return value


def takes_attention(command: Callable[P, R]) -> Callable[P, R]:
    """Add the options --attention and --attention-backend.

    Args:
        command: The function of the command.
    """
    attention = click.option(
        "--attention",
        type=click.Choice(ATTENTION),
        help="Self-attention of long sequences in PyTorch: 16 bit, int8 or fp8.  [default: the export's]",
    )
    backend = click.option(
        "--attention-backend",
        type=WORD,
        metavar="LIBRARY",
        callback=_known_library,
        help="What computes 8-bit attention: reference, or one library.  [default: the first that is right and faster]",
    )
    return attention(backend(command))
