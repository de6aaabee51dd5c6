"""The base of the model families: the layers that stay in 16 bit, the inputs and the shapes of a family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dvdquant.errors import ShapeError
from dvdquant.model.families.configs import PIPELINE, PipelineFacts, TransformerConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Axis", "Family", "ImageInputs", "InputSpec", "Sizes"]

Config = Mapping[str, Any]
Need = Literal["none", "optional", "required"]


@dataclass(frozen=True)
class ImageInputs:
    """The images that a transformer draws from.

    Args:
        first: Whether the first frame of the clip is given as an image.
        last: Whether the last one is.
    """

    first: Need = "none"
    last: Need = "none"

    def __str__(self) -> str:
        needs = (("first", self.first), ("last", self.last))
        return " and ".join(f"a {name} image ({need})" for name, need in needs if need != "none") or "no image"


@dataclass(frozen=True)
class Axis:
    """A size that is fixed (``min == opt == max``) or ranges; the engine is tuned for ``opt``.

    Args:
        min: The least size.
        opt: The size that the engine is tuned for.
        max: The greatest size.
    """

    min: int
    opt: int
    max: int

    @classmethod
    def fixed(cls, size: int) -> Axis:
        """Return an axis of one size.

        Args:
            size: The size.
        """
        return cls(size, size, size)

    @classmethod
    def parse(cls, text: str, option: str) -> Axis:
        """Read an axis from the text of an option.

        Args:
            text: ``"480"``, ``"480:720"`` (tuned for the larger) or ``"480:640:720"``.
            option: The name of the option, for the error.

        Raises:
            ShapeError: The text is no such size or range.
        """
        try:
            parts = [int(p) for p in text.split(":")]
        except ValueError:
            parts = []
        if len(parts) == 2:
            parts = [parts[0], parts[1], parts[1]]
        axis = cls(*parts) if len(parts) == 3 else cls.fixed(parts[0]) if len(parts) == 1 else None
        if axis is None or not 0 < axis.min <= axis.opt <= axis.max:
            raise ShapeError(f"{option} is {text!r}", available="SIZE, MIN:MAX or MIN:OPT:MAX with 0 < MIN ≤ OPT ≤ MAX")
        return axis

    @property
    def dynamic(self) -> bool:
        """Return whether the axis ranges."""
        return self.min != self.max

    def covering(self, size: int, patch: int) -> tuple[int, int]:
        """Return the ends of the least range that covers this axis and ``size`` and has multiples of ``patch`` as ends.

        Args:
            size: A size to cover.
            patch: The patch size, in the same unit.
        """
        return min(self.min, size // patch * patch or patch), max(self.max, -(-size // patch) * patch)

    def map(self, function: Any) -> Axis:
        """Return the axis with a function applied to its three sizes.

        Args:
            function: A function from int to int.
        """
        return Axis(function(self.min), function(self.opt), function(self.max))

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}" if self.dynamic else str(self.opt)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one export, in latent units (the units that the transformer sees), and the text length in tokens.

    Args:
        frames: The number of latent frames.
        height: The height in latents.
        width: The width in latents.
        text_tokens: The length of the text embedding in tokens.
        batch: The number of samples in one call.
    """

    frames: Axis
    height: Axis
    width: Axis
    text_tokens: int
    batch: int = 1

    @property
    def dynamic(self) -> bool:
        """Return whether any axis ranges."""
        return self.frames.dynamic or self.height.dynamic or self.width.dynamic

    def at(self, which: str) -> tuple[int, int, int]:
        """Return (frames, height, width) at one point of the ranges.

        Args:
            which: ``"min"``, ``"opt"`` or ``"max"``.
        """
        return getattr(self.frames, which), getattr(self.height, which), getattr(self.width, which)

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as a plain dict for the manifest."""
        axes = {name: [a.min, a.opt, a.max] for name, a in self._axes()}
        return {**axes, "text_tokens": self.text_tokens, "batch": self.batch}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sizes:
        """Read the sizes from a manifest, the inverse of :meth:`to_json`.

        Args:
            data: The sizes as :meth:`to_json` gives them.
        """
        frames, height, width = (Axis(*data[name]) for name in ("frames", "height", "width"))
        return cls(frames, height, width, int(data["text_tokens"]), int(data["batch"]))

    def _axes(self) -> list[tuple[str, Axis]]:
        """Return the three axes with their names."""
        return [("frames", self.frames), ("height", self.height), ("width", self.width)]


@dataclass(frozen=True)
class InputSpec:
    """One graph input: its shape at given latent sizes, and how a sample is drawn.

    Args:
        name: The name of the input.
        shape: A size or the name of an axis (``frames``, ``height``, ``width``, ``tokens``) per dimension.
        kind: ``latent`` and ``embedding`` are standard normal in the model's dtype. ``timestep`` counts from 0 to 1000
            in ``dtype``. ``mask`` is ones with a padded tail. ``rotary`` and ``coords`` are a family's own.
        dtype_name: The name of the input's dtype, such as ``float32``; None means the model's dtype.
    """

    name: str
    shape: tuple[int | str, ...]
    kind: str
    dtype_name: str | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the dtype of the input, or None for the model's dtype."""
        if self.dtype_name is None:
            return None
        import torch  # here, because a request is checked without torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    def sizes(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with the axis names filled in.

        Args:
            axes: The size of every axis name.
        """
        return tuple(axes[d] if isinstance(d, str) else d for d in self.shape)


class Family(ABC):
    """One model family. Instances hold no weights: everything is derived from the transformer's config.

    Use :func:`dvdquant.model.families.get_family` to make one. It checks the config and completes it.

    Args:
        config: The checked content of the transformer's ``config.json``.

    Attributes:
        name: The name of the family.
        class_names: The diffusers classes that belong to it.
        record: The record of the fields that its ``config.json`` may have.
        keep: Globs of the layers that stay in 16 bit.
        modulation: Globs of the blocks' own modulation linears.
        steady: Globs of the layers whose mean input is a matter of the weights.
        default_video: Frames, height and width in pixels of the default video.
        default_text_tokens: The default length of the text embedding in tokens.
        vae_scale: Frames or pixels per latent: time, height, width.
        schedule: ``flow`` mixes noise in linearly; ``diffusion`` mixes it so that the variance stays.
        per_token_timestep: True if the graph has a timestep for every token.
        facts: The facts that the pipeline around the transformer tells.
    """

    name: str
    class_names: tuple[str, ...]
    record: type[TransformerConfig]  # the fields that its config.json may have
    keep: tuple[str, ...]  # globs of layers that stay in 16 bit
    modulation: tuple[str, ...] = ()  # globs of the blocks' own modulation linears
    # Globs of layers behind a norm with modulation or behind the feed-forward's activation, for video tokens or for all
    # tokens with one modulation. The weights determine the mean of their inputs, so a synthetic run predicts it.
    steady: tuple[str, ...] = ()
    default_video: tuple[int, int, int]  # frames, height, width in pixels
    default_text_tokens: int
    vae_scale: tuple[int, int, int] = (4, 8, 8)  # time, height, width
    schedule: Literal["flow", "diffusion"] = "flow"  # how noise is mixed in: linearly, or so that the variance stays
    per_token_timestep: bool = False

    def __init__(self, config: Config) -> None:
        """Keep the config and the facts of its pipeline."""
        self.config = config
        self.facts = PipelineFacts(**config.get(PIPELINE, {}))

    @abstractmethod
    def patch(self) -> tuple[int, int, int]:
        """Return the patch size (time, height, width) in latent units."""

    @abstractmethod
    def inputs(self, sizes: Sizes) -> tuple[InputSpec, ...]:
        """Return the graph's inputs, in forward order.

        Args:
            sizes: The sizes of the export.
        """

    def latent_channels(self) -> int:
        """Return the channels of the clip's latents: those of the output, which are the input's where the config says none."""
        return int(self.config.get("out_channels") or self.config["in_channels"])

    def images(self) -> ImageInputs:
        """Return what images the transformer draws from; most draw from text alone."""
        return ImageInputs()

    def image_tokens(self) -> int:
        """Return the number of the text tokens that an image takes, which a pipeline puts before the words."""
        return 0

    def forward_kwargs(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return graph inputs as keyword arguments of the diffusers forward; for most families they are unchanged.

        Args:
            inputs: The inputs of the graph by name.
        """
        return dict(inputs)

    def axes(self, sizes: Sizes, which: str = "opt") -> dict[str, int]:
        """Return the size of every axis name that input shapes use.

        Args:
            sizes: The sizes of the export.
            which: The point of the ranges: ``"min"``, ``"opt"`` or ``"max"``.
        """
        frames, height, width = sizes.at(which)
        return {"frames": frames, "height": height, "width": width, "tokens": self.tokens(frames, height, width)}

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Return the number of video tokens of the transformer.

        Args:
            frames: The number of latent frames.
            height: The height in latents.
            width: The width in latents.
        """
        t, h, w = self.patch()
        return (frames // t) * (height // h) * (width // w)

    def check(self, sizes: Sizes) -> None:
        """Check that the model can run at these sizes.

        Args:
            sizes: The sizes of an export.

        Raises:
            ShapeError: An axis is no multiple of the patch (the error names the nearest sizes that are), or is too long
                for the model.
        """
        longest = self.longest_axis()
        for axis_name, axis, patch in zip(("frames", "height", "width"), self._axes(sizes), self.patch()):
            fix = f"change --{axis_name.replace('frames', 'num-frames')} or --latent"
            if longest is not None and axis.max > longest * patch:
                raise ShapeError(
                    f"{axis_name} is {axis.max} in latent units, and the model has positions for {longest} patches of {patch}",
                    available=f"up to {longest * patch}",
                    fix=fix,
                )
            for size in {axis.min, axis.opt, axis.max}:
                if size % patch:
                    below = size // patch * patch
                    raise ShapeError(
                        f"{axis_name} is {size} in latent units, no multiple of the patch size {patch}",
                        available=f"{below or patch} or {below + patch}",
                        fix=fix,
                    )

    def longest_axis(self) -> int | None:
        """Return the number of patches along an axis that the model has positions for, or None if there is no limit."""
        return None

    def probe(self) -> tuple[int, int, int]:
        """Return small latent sizes (frames, height, width) that the model runs at."""
        time, height, width = self.patch()
        return 2 * time, 2 * height, 2 * width

    def latent_frames(self, frames: int) -> int:
        """Return the number of latent frames of a video (causal VAE: the first frame stands alone).

        Args:
            frames: The number of frames of the video, at least 1.
        """
        return (frames - 1) // self.vae_scale[0] + 1

    def sample(self, sizes: Sizes, dtype: torch.dtype, seed: int = 0, which: str = "opt") -> dict[str, Tensor]:
        """Draw random inputs of the graph, for tracing and for verification, not for quantization.

        Args:
            sizes: The sizes of the export.
            dtype: The dtype of the model.
            seed: The seed of the random numbers.
            which: The point of the ranges: ``"min"``, ``"opt"`` or ``"max"``.

        Returns:
            A tensor for every input, by name, on the CPU.
        """
        import torch

        generator = torch.Generator().manual_seed(seed)
        axes = self.axes(sizes, which)
        return {spec.name: self.draw(spec, spec.sizes(axes), dtype, generator) for spec in self.inputs(sizes)}

    def draw(self, spec: InputSpec, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Draw one random input.

        Args:
            spec: The input.
            shape: Its shape.
            dtype: The dtype of the model, used if the spec has none.
            generator: The source of random numbers, on the CPU.
        """
        import torch

        if spec.kind == "timestep":
            # Flow matching schedulers have fractional timesteps.
            return (1 + 999 * torch.rand(shape, generator=generator)).to(spec.dtype or torch.float32)
        if spec.kind == "mask":
            mask = torch.ones(shape, dtype=spec.dtype or torch.int64)
            mask[..., max(1, shape[-1] * 3 // 4) :] = 0
            return mask
        return torch.randn(shape, generator=generator).to(spec.dtype or dtype)

    @staticmethod
    def _axes(sizes: Sizes) -> tuple[Axis, Axis, Axis]:
        """Return the three axes: frames, height, width."""
        return sizes.frames, sizes.height, sizes.width
