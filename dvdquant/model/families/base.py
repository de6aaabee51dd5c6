"""What is specific to a model family: which layers stay in 16 bit, its inputs, its shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dvdquant.errors import ShapeError
from dvdquant.model.families.configs import PIPELINE, PipelineFacts, TransformerConfig

__all__ = ["Axis", "Family", "InputSpec", "Sizes"]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """A size that is fixed (``min == opt == max``) or ranges; the engine is tuned for ``opt``."""

    min: int
    opt: int
    max: int

    @classmethod
    def fixed(cls, size: int) -> Axis:
        """An axis of one size."""
        return cls(size, size, size)

    @classmethod
    def parse(cls, text: str, option: str) -> Axis:
        """``"480"``, ``"480:720"`` (tuned for the larger) or ``"480:640:720"``; ShapeError otherwise."""
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
        """Whether the axis ranges."""
        return self.min != self.max

    def covering(self, size: int, patch: int) -> tuple[int, int]:
        """The ends of the least range over this axis and ``size`` that are multiples of ``patch``."""
        return min(self.min, size // patch * patch or patch), max(self.max, -(-size // patch) * patch)

    def map(self, function: Any) -> Axis:
        """Apply an int -> int function to the three sizes."""
        return Axis(function(self.min), function(self.opt), function(self.max))

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}" if self.dynamic else str(self.opt)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one export, in latent units (what the transformer sees), and the text length in tokens."""

    frames: Axis
    height: Axis
    width: Axis
    text_tokens: int
    batch: int = 1

    @property
    def dynamic(self) -> bool:
        """Whether any axis ranges."""
        return self.frames.dynamic or self.height.dynamic or self.width.dynamic

    def at(self, which: str) -> tuple[int, int, int]:
        """(frames, height, width) at ``"min"``, ``"opt"`` or ``"max"``."""
        return getattr(self.frames, which), getattr(self.height, which), getattr(self.width, which)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        axes = {name: [a.min, a.opt, a.max] for name, a in self._axes()}
        return {**axes, "text_tokens": self.text_tokens, "batch": self.batch}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sizes:
        """Inverse of :meth:`to_json`."""
        frames, height, width = (Axis(*data[name]) for name in ("frames", "height", "width"))
        return cls(frames, height, width, int(data["text_tokens"]), int(data["batch"]))

    def _axes(self) -> list[tuple[str, Axis]]:
        return [("frames", self.frames), ("height", self.height), ("width", self.width)]


@dataclass(frozen=True)
class InputSpec:
    """One graph input: its shape at given latent sizes, and how a sample is drawn.

    Args:
        shape: a size or the name of an axis (``frames``, ``height``, ``width``, ``tokens``) per dimension.
        kind: ``latent`` and ``embedding`` are standard normal in the model's dtype, ``timestep`` counts 0..1000 in
            ``dtype``, ``mask`` is ones with a padded tail, ``coords`` is a family's own.
    """

    name: str
    shape: tuple[int | str, ...]
    kind: str
    dtype: torch.dtype | None = None

    def sizes(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with the axis names filled in."""
        return tuple(axes[d] if isinstance(d, str) else d for d in self.shape)


class Family(ABC):
    """One model family. Instances hold no weights: everything is derived from the transformer's config."""

    name: str
    class_names: tuple[str, ...]
    record: type[TransformerConfig]  # what its config.json may say
    keep: tuple[str, ...]  # globs of layers that stay in 16 bit
    modulation: tuple[str, ...] = ()  # globs of the blocks' own modulation linears
    # Globs of layers behind a norm with modulation or behind the feed-forward's activation, of video tokens or of all with
    # one modulation: the mean of their inputs is a matter of the weights, and a synthetic run predicts it.
    steady: tuple[str, ...] = ()
    default_video: tuple[int, int, int]  # frames, height, width in pixels
    default_text_tokens: int
    vae_scale: tuple[int, int, int] = (4, 8, 8)  # time, height, width
    schedule: Literal["flow", "diffusion"] = "flow"  # noise is mixed in linearly, or so that the variance stays

    def __init__(self, config: Config) -> None:
        """Use :func:`dvdquant.model.families.get_family`, which checks the config and completes it."""
        self.config = config
        self.facts = PipelineFacts(**config.get(PIPELINE, {}))

    @abstractmethod
    def patch(self) -> tuple[int, int, int]:
        """Patch size (time, height, width) in latent units."""

    @abstractmethod
    def inputs(self, sizes: Sizes) -> tuple[InputSpec, ...]:
        """The graph's inputs, in forward order."""

    def forward_kwargs(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Graph inputs as keyword arguments of the diffusers forward; the identity for most families."""
        return dict(inputs)

    def axes(self, sizes: Sizes, which: str = "opt") -> dict[str, int]:
        """Concrete values of the axis names used in input shapes."""
        frames, height, width = sizes.at(which)
        return {"frames": frames, "height": height, "width": width, "tokens": self.tokens(frames, height, width)}

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Video tokens of the transformer at these latent sizes."""
        t, h, w = self.patch()
        return (frames // t) * (height // h) * (width // w)

    def check(self, sizes: Sizes) -> None:
        """ShapeError when an axis is no multiple of the patch, naming the nearest sizes that are, or too long for the model."""
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
        """Patches along an axis that the model has positions for; None where it computes them for any length."""
        return None

    def probe(self) -> tuple[int, int, int]:
        """Small latent sizes (frames, height, width) that the model runs at."""
        time, height, width = self.patch()
        return 2 * time, 2 * height, 2 * width

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a video of ``frames`` frames (causal VAE: the first frame stands alone)."""
        return (frames - 1) // self.vae_scale[0] + 1

    def sample(self, sizes: Sizes, dtype: torch.dtype, seed: int = 0, which: str = "opt") -> dict[str, Tensor]:
        """Random inputs of the graph: for tracing and for verification, not for quantization."""
        generator = torch.Generator().manual_seed(seed)
        axes = self.axes(sizes, which)
        return {spec.name: self.draw(spec, spec.sizes(axes), dtype, generator) for spec in self.inputs(sizes)}

    def draw(self, spec: InputSpec, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """One random input of ``spec``."""
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
        return sizes.frames, sizes.height, sizes.width
