"""What a diffusers pipeline passes to its transformer, as the inputs of the exported graph.

A pipeline calls the same ``forward`` whatever stands behind it, so an adapter takes the arguments of the family's own
diffusers class and gives the graph's inputs by name: floating tensors in the export's dtype, timesteps and guidance in
fp32, masks in int64, rotary tables and coordinates in fp32.

Timesteps are never rounded here: integers below 2²⁴ and fp32 values pass into fp32 exactly. Where the pipeline itself has
rounded one (HunyuanVideo casts t to the dtype of its latents, 16-bit from the second step on), that value is kept,
because it is the one the unquantized transformer gets too.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.families import Family, InputSpec, Sizes

__all__ = ["ADAPTERS", "Adapter", "get_adapter"]


class Adapter:
    """One family's forward arguments -> graph inputs, for an export of ``sizes`` in ``dtype``."""

    ignored: tuple[str, ...] = ()  # arguments that the diffusers forward also ignores for this config

    def __init__(self, family: Family, sizes: Sizes, dtype: torch.dtype) -> None:
        self.family, self.sizes, self.dtype = family, sizes, dtype
        self.specs = family.inputs(sizes)
        model_class = getattr(importlib.import_module("diffusers"), family.config["_class_name"])
        self._signature = inspect.signature(model_class.forward)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name; TypeError for one that the family's diffusers class does not take either."""
        arguments = dict(self._signature.bind(None, *args, **kwargs).arguments)
        arguments.pop("self")
        return arguments

    def inputs(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """The graph's inputs of the whole batch, in graph order.

        Raises:
            UnsupportedError: an argument that the exported graph has no input for.
            ShapeError: an input is missing, or has another text length or timestep shape than the export's.
        """
        given = {name: value for name, value in arguments.items() if value is not None and name not in self.ignored}
        latents = given["hidden_states"]
        values = {spec.name: self._value(spec, given, latents) for spec in self.specs}
        if given:
            name = next(iter(given))
            raise UnsupportedError(
                f"the exported {self.family.name} graph has no input for {name}",
                available=[spec.name for spec in self.specs],
                fix=f"leave {name} out, or run this model in diffusers",
            )
        self._check_text(values)
        return values

    def slices(self, inputs: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Cut the batch into calls of ``sizes.batch`` samples: the inputs of each call and how many samples count.

        A last call that is not full repeats its last sample, since the graph's batch is fixed.
        """
        batch, limit = inputs["hidden_states"].shape[0], self.sizes.batch
        for start in range(0, batch, limit):
            count = min(limit, batch - start)
            rows = torch.arange(start, start + limit).clamp(max=start + count - 1).tolist()
            yield {spec.name: self._rows(spec, inputs[spec.name], rows) for spec in self.specs}, count

    def _rows(self, spec: InputSpec, value: Tensor, rows: list[int]) -> Tensor:
        size = spec.shape[0]
        if not isinstance(size, int) or size % self.sizes.batch or spec.name == "ofs":
            return value
        each = size // self.sizes.batch  # rows of one sample: 2 for the image embeddings of a first and a last frame
        if rows == list(range(value.shape[0] // each)):
            return value
        return value[[row * each + i for row in rows for i in range(each)]]

    def _value(self, spec: InputSpec, given: dict[str, Any], latents: Tensor) -> Tensor:
        """One graph input, taken out of ``given``."""
        value = given.pop(spec.name, None)
        if value is None:
            raise ShapeError(
                f"the transformer was called without {spec.name}",
                available=list(given),
                fix=f"pass {spec.name}: the exported graph has it as an input",
            )
        if spec.kind == "timestep":
            return self._timestep(spec, torch.as_tensor(value, device=latents.device), latents)
        dtype = (
            torch.int64 if spec.kind == "mask" else torch.float32 if spec.kind in ("rotary", "coords") else self.dtype
        )
        return torch.as_tensor(value).to(device=latents.device, dtype=spec.dtype or dtype)

    def _timestep(self, spec: InputSpec, value: Tensor, latents: Tensor) -> Tensor:
        """fp32, one per sample, or as many as the spec has."""
        value = value.to(torch.float32)
        if value.ndim == 0 or (value.ndim == 1 and value.shape[0] == 1 and spec.name != "ofs"):
            value = value.expand(latents.shape[0] if spec.name != "ofs" else 1)
        if value.ndim != 1:
            raise ShapeError(
                f"{spec.name} has the shape {tuple(value.shape)}: one per token, but this {self.family.name} was "
                "exported with one per sample",
                available=f"a {spec.name} of shape ({latents.shape[0]},)",
                fix="use the text-to-video pipeline of this model (for Wan: expand_timesteps=False)",
            )
        return value

    def _check_text(self, values: Mapping[str, Tensor]) -> None:
        text = values["encoder_hidden_states"]
        if text.shape[1] != self.sizes.text_tokens:
            raise ShapeError(
                f"the text embedding has {text.shape[1]} tokens, and this export takes {self.sizes.text_tokens}",
                available=f"{self.sizes.text_tokens} text tokens",
                fix=f"call the pipeline with max_sequence_length={self.sizes.text_tokens}, or export again with "
                f"--text-tokens {text.shape[1]}",
            )


class WanAdapter(Adapter):
    """Timesteps per sample, or per token for TI2V-5B, whose samples' own timestep stands for all of their tokens."""

    def _timestep(self, spec: InputSpec, value: Tensor, latents: Tensor) -> Tensor:
        if spec.shape[1:] != ("tokens",):
            return super()._timestep(spec, value, latents)
        if value.ndim < 2:
            tokens = self.family.tokens(*latents.shape[-3:])
            value = super()._timestep(spec, value, latents)[:, None].expand(-1, tokens)
        return value.to(torch.float32)


class HunyuanVideoAdapter(Adapter):
    """The pipeline passes the guidance scale always; only guidance-distilled models have an input for it."""

    def __init__(self, family: Family, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__(family, sizes, dtype)
        if not family.config["guidance_embeds"]:
            self.ignored = ("guidance",)


class CogVideoXAdapter(Adapter):
    """``image_rotary_emb``, a pair, becomes the inputs ``rotary_cos`` and ``rotary_sin`` [tokens, head_dim]."""

    def inputs(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """See :meth:`Adapter.inputs`."""
        arguments = dict(arguments)
        rotary = arguments.pop("image_rotary_emb", None)
        if rotary is not None:
            if not self.family.config["use_rotary_positional_embeddings"]:
                raise UnsupportedError(
                    "image_rotary_emb was given to a CogVideoX with additive position embeddings",
                    fix="leave image_rotary_emb out",
                )
            arguments["rotary_cos"], arguments["rotary_sin"] = rotary
        return super().inputs(arguments)


class LTXVideoAdapter(Adapter):
    """``num_frames``, ``height``, ``width`` and the interpolation scale become the input ``video_coords`` [B, 3, tokens].

    The graph divides coordinates by the base sizes (20 frames, 2048 × 2048 pixels) as diffusers does for a given
    ``video_coords``; the products here are formed in diffusers' order, so that the quotient is the same to the bit.
    """

    base = (20, 2048, 2048)

    def inputs(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """See :meth:`Adapter.inputs`."""
        arguments = dict(arguments)
        axes = {name: arguments.pop(name, None) for name in ("num_frames", "height", "width")}
        scale = arguments.pop("rope_interpolation_scale", None)
        mask = arguments.get("encoder_attention_mask")
        if mask is not None and mask.ndim != 2:
            raise ShapeError(
                f"encoder_attention_mask has the shape {tuple(mask.shape)}",
                available="[batch, text tokens], 1 for a token and 0 for padding",
                fix="pass the tokenizer's mask, not an attention bias",
            )
        if arguments.get("video_coords") is None:
            missing = [name for name, size in axes.items() if size is None]
            if missing:
                raise ShapeError(
                    f"the transformer was called without video_coords and without {', '.join(missing)}",
                    fix="pass num_frames, height and width in latent units, or video_coords",
                )
            arguments["video_coords"] = self.coordinates(
                arguments["hidden_states"], (axes["num_frames"], axes["height"], axes["width"]), scale
            )
        return super().inputs(arguments)

    def coordinates(self, latents: Tensor, sizes: tuple[int, int, int], scale: Any) -> Tensor:
        """fp32 [B, 3, frames · height · width]: frame, row and column of every token, times ``scale`` and the patch.

        Args:
            sizes: frames, height, width in latent units. scale: three factors (to seconds and pixels), or None.
        """
        grid = torch.meshgrid(
            *(torch.arange(size, dtype=torch.float32, device=latents.device) for size in sizes), indexing="ij"
        )
        patch = self.family.patch()
        factors = self.base if scale is None else scale
        steps = (1, 1, 1) if scale is None else patch
        axes = [axis * factor * step for axis, factor, step in zip(grid, factors, steps)]
        return torch.stack(axes).flatten(1)[None].expand(latents.shape[0], -1, -1)


ADAPTERS: dict[str, type[Adapter]] = {
    "wan": WanAdapter,
    "hunyuan-video": HunyuanVideoAdapter,
    "cogvideox": CogVideoXAdapter,
    "ltx-video": LTXVideoAdapter,
}


def get_adapter(family: Family, sizes: Sizes, dtype: torch.dtype) -> Adapter:
    """The adapter of ``family``; UnsupportedError for a family that has none."""
    if family.name not in ADAPTERS:
        raise UnsupportedError(f"there is no pipeline adapter for {family.name}", available=ADAPTERS)
    return ADAPTERS[family.name](family, sizes, dtype)
