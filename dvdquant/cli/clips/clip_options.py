"""The options that ``dvdq-run`` and ``dvdq-plan`` share: what a clip shows, and how the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from dvdquant.clashes import Clash, session_clashes
from dvdquant.cli.shared.attention_options import takes_attention
from dvdquant.cli.shared.common import CUDA_GRAPHS, FUSE, P, R, takes_plugins
from dvdquant.cli.shared.paths import MODEL, PATH, WORD

__all__ = ["clip_options", "loading_clashes", "loading_options"]


_CLIP = (
    click.option("--negative-prompt", metavar="TEXT", help="What guidance leads away from.  [default: the model's]"),
    click.option(
        "--image",
        type=PATH,
        metavar="FILE",
        help="The first frame, of models that draw from one; stretched to the clip's size.",
    ),
    click.option("--last-image", type=PATH, metavar="FILE", help="The last frame, of models that draw from two."),
    click.option("--height", type=int, help="Pixels.  [default: what the export was tuned for]"),
    click.option("--width", type=int, help="Pixels."),
    click.option("--num-frames", type=int, help="Frames."),
    click.option("--guidance", type=float, metavar="SCALE", help="Guidance scale.  [default: the model's]"),
    click.option(
        "--text-embeds",
        type=PATH,
        metavar="FILE",
        help="Text embeddings saved by --save-text-embeds, instead of a text encoder; without --prompt all of its prompts.",
    ),
)
_LOADING = (
    click.option(
        "--pipeline",
        type=MODEL,
        metavar="PATH",
        help="Folder or hub id with text encoder, VAE, scheduler.  [default: the exported model]",
    ),
    click.option(
        "--offload",
        is_flag=True,
        help="Keep text encoder and VAE in the host's memory, each on the GPU only while it runs.",
    ),
    click.option(
        "--text-encoder-bits",
        type=click.Choice(["16", "8", "4"]),
        help="Bits of the text encoder's weights; 8 needs torchao.  [default: 16]",
    ),
    click.option("--vae-tiling", is_flag=True, help="Decode in tiles, one after the other: less memory, more time."),
    click.option(
        "--compile",
        is_flag=True,
        help="Run in PyTorch and compile the transformer's blocks: the first step takes a minute more.",
    ),
    click.option("--fuse/--no-fuse", default=None, help=FUSE),
    click.option("--cuda-graphs", is_flag=True, help=CUDA_GRAPHS),
    takes_attention,
    takes_plugins,
    click.option(
        "--revision", type=WORD, metavar="REVISION", help="Branch, tag or commit, where OUT is user/name on the hub."
    ),
)


def _with(options: tuple[Callable[[Any], Any], ...], command: Callable[P, R]) -> Callable[P, R]:
    for option in reversed(options):
        command = option(command)
    return command


def clip_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add the options of what a clip shows, and of the text it is drawn from.

    Args:
        command: The function of the command.
    """
    return _with(_CLIP, command)


def loading_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add the options of how the model's parts are found and loaded.

    Args:
        command: The function of the command.
    """
    return _with(_LOADING, command)


def loading_clashes(options: Mapping[str, Any]) -> list[Clash]:
    """Return the options of loading that exclude each other.

    Args:
        options: The options of :func:`loading_options`, ``--backend`` and ``--text-embeds``, by their names.
    """
    return [
        *session_clashes(options),
        Clash(
            options["text_embeds"] is not None and options["text_encoder_bits"] is not None,
            "--text-embeds takes the text encoder's place, so --text-encoder-bits does not apply",
        ),
    ]
