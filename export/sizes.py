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
    scales, patches = family.vae_scale, family.patch()
    for axis, name, scale, patch in zip(given[1:], names[1:], scales[1:], patches[1:]):
        unit = scale * patch  # sizes that the VAE takes and the transformer does not would be refused in latent units
        for size in (axis.min, axis.opt, axis.max):
            if size % unit:
                below = size // unit * unit
                parts = f"the VAE's {scale}" + (f" times the transformer's patch of {patch}" if patch > 1 else "")
                raise ShapeError(
                    f"{name} is {size} pixels, no multiple of {unit}, which is {parts}",
                    available=f"{below or unit} or {below + unit}",
                    fix=f"change {name} to one of these",
                )
    frames, height, width = given
    for size in (frames.min, frames.opt, frames.max):
        if (size - 1) % scales[0] or family.latent_frames(size) % patches[0]:
            raise ShapeError(
                f"--num-frames is {size}, but the VAE makes one latent of the first frame and one of every {scales[0]} more"
                + (f", and the transformer takes {patches[0]} latents at once" if patches[0] > 1 else ""),
                available=" or ".join(map(str, _near_frames(family, size))),
                fix="change --num-frames to one of these",
            )
    return [
        frames.map(family.latent_frames),
        height.map(lambda size: size // scales[1]),
        width.map(lambda size: size // scales[2]),
    ]


def _near_frames(family: Family, size: int) -> list[int]:
    """Return the nearest numbers of frames, below and above, that the VAE and the transformer take."""

    def fits(frames: int) -> bool:
        return (frames - 1) % family.vae_scale[0] == 0 and family.latent_frames(frames) % family.patch()[0] == 0

    reach = family.vae_scale[0] * family.patch()[0]
    below = [frames for frames in range(size - 1, max(0, size - 1 - reach), -1) if fits(frames)]
    above = [frames for frames in range(size + 1, size + 1 + reach) if fits(frames)]
    return [*below[:1], *above[:1]]
