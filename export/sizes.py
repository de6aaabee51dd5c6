"""The sizes of the transformer's latents that the options of an export come to."""

from __future__ import annotations

from dvdquant.errors import ShapeError
from dvdquant.export.options import ExportOptions
from dvdquant.model.families import Axis, Family, Sizes

__all__ = ["resolve_sizes"]


def resolve_sizes(family: Family, options: ExportOptions) -> Sizes:
    """Return the latent sizes of an export, checked against the family's patch.

    Args:
        family: The model family.
        options: The options of the export. Sizes that they leave open are the family's defaults.

    Raises:
        ShapeError: The VAE or the patch does not divide a size, sizes are given in both ways at once, a size has bad
            syntax, or the batch or the number of text tokens is less than 1.
    """
    # 1. The text.
    tokens = options.text_tokens
    if tokens is None:
        tokens = family.config.get("max_text_seq_length") or family.default_text_tokens
    if tokens < 1 or options.batch < 1:
        raise ShapeError(f"--text-tokens is {tokens} and --batch {options.batch}", fix="give at least 1 for each")
    # 2. The video, in latent units or in pixels and frames.
    pixels = (options.num_frames, options.height, options.width)
    if options.latent is not None:
        if any(p is not None for p in pixels):
            raise ShapeError(
                "--latent was given together with --num-frames, --height or --width",
                fix="give the sizes in one unit: --latent FxHxW counts latents, the others pixels and frames",
            )
        axes = _parse_latent(options.latent)
    else:
        axes = _from_pixels(family, pixels)
    # 3. The check against the model.
    frames, height, width = axes
    sizes = Sizes(frames, height, width, int(tokens), options.batch)
    family.check(sizes)
    return sizes


def _parse_latent(text: str) -> list[Axis]:
    """Return the three axes of ``--latent``.

    Raises:
        ShapeError: The text has another form.
    """
    parts = text.lower().split("x")
    if len(parts) != 3:
        raise ShapeError(f"--latent is {text!r}", available="FRAMESxHEIGHTxWIDTH in latent units, such as 21x60x104")
    return [Axis.parse(part, f"--latent ({name})") for name, part in zip(("frames", "height", "width"), parts)]


def _from_pixels(family: Family, pixels: tuple[str | None, str | None, str | None]) -> list[Axis]:
    """Return the three axes in latent units from sizes in frames and pixels.

    Args:
        family: The model family.
        pixels: The number of frames, the height and the width as given; None means the family's default.

    Raises:
        ShapeError: The VAE does not divide a size, or a size has bad syntax.
    """
    names = ("--num-frames", "--height", "--width")
    given = [
        Axis.parse(text, name) if text is not None else Axis.fixed(default)
        for text, name, default in zip(pixels, names, family.default_video)
    ]
    scales = family.vae_scale
    for axis, name, scale in zip(given[1:], names[1:], scales[1:]):
        for size in (axis.min, axis.opt, axis.max):
            if size % scale:
                below = size // scale * scale
                raise ShapeError(
                    f"{name} is {size}, no multiple of the VAE's {scale}",
                    available=f"{below or scale} or {below + scale}",
                    fix=f"change {name}, or give latent sizes with --latent",
                )
    frames, height, width = given
    for size in (frames.min, frames.opt, frames.max):
        if over := (size - 1) % scales[0]:
            raise ShapeError(
                f"--num-frames is {size}, but the VAE makes one latent of the first frame and one of every {scales[0]} more",
                available=f"{size - over} or {size - over + scales[0]}",
                fix="change --num-frames, or give latent sizes with --latent",
            )
    return [
        frames.map(family.latent_frames),
        height.map(lambda size: size // scales[1]),
        width.map(lambda size: size // scales[2]),
    ]
