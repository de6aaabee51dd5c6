"""Adapters from the arguments that a diffusers pipeline passes to its transformer to the inputs of the exported graph.

A pipeline calls the same ``forward`` for every kind of transformer. So an adapter takes the arguments of the family's
own diffusers class and gives the graph's inputs by name: floating tensors in the export's dtype, timesteps and guidance
in fp32, masks in int64, rotary tables and coordinates in fp32.

Timesteps are never rounded here: integers below 2²⁴ and fp32 values pass into fp32 exactly. If the pipeline itself has
rounded a timestep (HunyuanVideo casts t to the dtype of its latents, 16-bit from the second step on), the rounded value
is kept, because the unquantized transformer gets it too.

The number of latents is the number of samples. An input for one sample is used for all of them, as in diffusers. Any
other number is refused.
"""

from __future__ import annotations

import importlib
import inspect
import math
import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.model.families import Family, InputSpec, Sizes

if TYPE_CHECKING:
    from dvdquant.deploy.switching.runner import StepRunner

__all__ = ["ADAPTERS", "Adapter", "get_adapter"]


class Adapter:
    """A conversion of one family's forward arguments to graph inputs.

    Args:
        family: The model family.
        sizes: The sizes of the export.
        dtype: The dtype of the export.
    """

    ignored: tuple[str, ...] = ()  # arguments that diffusers' own forward also ignores for this config

    def __init__(self, family: Family, sizes: Sizes, dtype: torch.dtype) -> None:
        self.family, self.sizes, self.dtype = family, sizes, dtype
        self.specs = family.inputs(sizes)
        model_class = getattr(importlib.import_module("diffusers"), family.config["_class_name"])
        self._signature = inspect.signature(model_class.forward)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments by name.

        Args:
            args: The positional arguments of ``forward``.
            kwargs: The keyword arguments of ``forward``.

        Raises:
            TypeError: The family's diffusers class does not take such an argument either.
        """
        arguments = dict(self._signature.bind(None, *args, **kwargs).arguments)
        arguments.pop("self")
        return arguments

    def inputs(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the graph's inputs of the whole batch, in graph order.

        Args:
            arguments: The arguments of ``forward`` by name.

        Raises:
            UnsupportedError: The exported graph has no input for an argument.
            ShapeError: An input is missing or no tensor. Or its text length, timestep shape or number of axes differs
                from the export's. Or it is for neither one sample nor as many samples as the latents.
        """
        given = {name: value for name, value in arguments.items() if value is not None and name not in self.ignored}
        latents = self._latents(given)
        values = {spec.name: self._value(spec, given, latents) for spec in self.specs}
        if given:
            name = next(iter(given))
            raise UnsupportedError(
                f"the exported {self.family.name} graph has no input for {name}",
                available=[spec.name for spec in self.specs],
                fix=f"leave {name} out, or run this model in diffusers",
            )
        self._check_text(values)
        return {spec.name: self._batched(spec, values[spec.name], latents.shape[0]) for spec in self.specs}

    def slices(self, inputs: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Cut the batch into calls of ``sizes.batch`` samples.

        If the last call is not full, it repeats its last sample, because the graph's batch is fixed.

        Args:
            inputs: The graph's inputs of the whole batch.

        Yields:
            The inputs of one call, and the number of its samples that count.
        """
        batch, limit = inputs["hidden_states"].shape[0], self.sizes.batch
        for start in range(0, batch, limit):
            count = min(limit, batch - start)
            rows = torch.arange(start, start + limit).clamp(max=start + count - 1).tolist()
            yield {spec.name: self._rows(spec, inputs[spec.name], rows) for spec in self.specs}, count

    def run(
        self, runner: StepRunner, inputs: Mapping[str, Tensor], branch: str, step: int | None, steps: int | None
    ) -> Tensor:
        """Run one branch of a step, in calls of ``sizes.batch`` samples.

        Args:
            runner: The runner of the request.
            inputs: The graph's inputs of the whole batch.
            branch: The name of the branch; several calls are told apart by a number behind it.
            step: The index of the step, or None if it is not known.
            steps: The number of steps, or None if it is not known.

        Returns:
            The output of the whole batch, in the order of its samples.
        """
        slices = list(self.slices(inputs))
        whole = None if len(slices) == 1 else inputs["hidden_states"]
        samples = []
        for number, (part, count) in enumerate(slices):
            name = branch if len(slices) == 1 else f"{branch}/{number}"
            samples.append(runner.run(part, branch=name, step=step, steps=steps, latents=whole)[:count])
        return samples[0] if len(samples) == 1 else torch.cat(samples)

    def rows_per_sample(self, spec: InputSpec) -> int | None:
        """Return the rows of one sample, or None if all samples share one row.

        It is 2 for the image embeddings of a first and a last frame.

        Args:
            spec: The input of the graph.
        """
        size = spec.shape[0]
        if not isinstance(size, int) or size % self.sizes.batch or spec.name == "ofs":
            return None
        return size // self.sizes.batch

    def _batched(self, spec: InputSpec, value: Tensor, batch: int) -> Tensor:
        """Return an input for ``batch`` samples: unchanged, or repeated if it is for one sample.

        Raises:
            ShapeError: The input is for another number of samples.
        """
        each = self.rows_per_sample(spec)
        if each is None or value.shape[0] == each * batch:
            return value
        if value.shape[0] == each:
            return value.repeat(batch, *(1 for _ in value.shape[1:]))
        samples = f"{value.shape[0] / each:g}"
        raise ShapeError(
            f"{spec.name} has shape {list(value.shape)}, for {samples} samples, and the latents have {batch}",
            available=f"{each * batch} rows, or {each} for all samples",
            fix="give every input for the same samples; pipelines repeat prompts by num_videos_per_prompt",
        )

    def _rows(self, spec: InputSpec, value: Tensor, rows: list[int]) -> Tensor:
        each = self.rows_per_sample(spec)
        if each is None:
            return value
        if rows == list(range(value.shape[0] // each)):
            return value
        return value[[row * each + i for row in rows for i in range(each)]]

    def _latents(self, given: Mapping[str, Any]) -> Tensor:
        """Return the latents, which the other inputs are compared with.

        Raises:
            ShapeError: They are no floating tensor with the graph's number of axes, or have no sample.
        """
        latents, spec = given.get("hidden_states"), self.specs[0]
        if not isinstance(latents, Tensor) or not latents.is_floating_point() or latents.ndim != len(spec.shape):
            raise ShapeError(
                f"hidden_states is {_named(latents)}",
                available=f"latents of floats [{', '.join(map(str, spec.shape))}]",
            )
        if not latents.shape[0]:
            raise ShapeError("hidden_states holds no sample", available="a batch of 1 or more")
        return latents

    def _value(self, spec: InputSpec, given: dict[str, Any], latents: Tensor) -> Tensor:
        """Take one graph input out of ``given`` and return it in its dtype."""
        value = given.pop(spec.name, None)
        if value is None:
            raise ShapeError(
                f"the transformer was called without {spec.name}",
                available=list(given),
                fix=f"pass {spec.name}: the exported graph has it as an input",
            )
        tensor = as_tensor(spec.name, value).to(latents.device)
        if spec.kind == "timestep":
            return self._timestep(spec, tensor, latents)
        if tensor.ndim != len(spec.shape):
            raise ShapeError(
                f"{spec.name} has shape {list(tensor.shape)}: {tensor.ndim} axes instead of {len(spec.shape)}",
                available=f"[{', '.join(map(str, spec.shape))}]",
            )
        dtype = (
            torch.int64 if spec.kind == "mask" else torch.float32 if spec.kind in ("rotary", "coords") else self.dtype
        )
        return tensor.to(spec.dtype or dtype)

    def _timestep(self, spec: InputSpec, value: Tensor, latents: Tensor) -> Tensor:
        """Return the timesteps in fp32: one per sample, one per token, or as many as the spec has.

        A graph with one per token also serves a pipeline that gives one per sample: it holds for all tokens.
        """
        value = value.to(torch.float32)
        samples = 1 if spec.name == "ofs" else latents.shape[0]
        if value.ndim == 0 or (value.ndim == 1 and value.shape[0] == 1):
            value = value.reshape(1).expand(samples)
        if spec.name == "ofs" and value.shape != (1,):
            raise ShapeError(f"ofs has shape {list(value.shape)}", available="one number for all samples")
        if spec.shape[1:] == ("tokens",):
            value = value[:, None] if value.ndim == 1 else value
            if value.ndim != 2 or not value.shape[1]:
                raise ShapeError(
                    f"timestep has shape {list(value.shape)}", available="one per sample, or [samples, tokens]"
                )
            return value if value.shape[1] > 1 else value.expand(-1, self._tokens(latents))
        if value.ndim == 2 and value.shape[1] == 1:
            value = value[:, 0]
        if value.ndim != 1:
            fix = {
                "wan": "use a pipeline with expand_timesteps=False, or export again from the pipeline's own folder, which tells",
                "ltx-video": "export again: this export was made before image to video was supported for this model",
            }
            raise ShapeError(
                f"{spec.name} has the shape {tuple(value.shape)}: one per token, but this {self.family.name} was "
                "exported with one per sample",
                available=f"a {spec.name} of shape ({latents.shape[0]},)",
                fix=fix.get(self.family.name, "use the pipeline that this model was published with"),
            )
        return value

    def _tokens(self, latents: Tensor) -> int:
        """Return the number of video tokens of the latents."""
        packed = self.specs[0].shape[1] == "tokens"
        return latents.shape[1] if packed else self.family.tokens(*latents.shape[-3:])

    def _check_text(self, values: Mapping[str, Tensor]) -> None:
        text = values["encoder_hidden_states"]
        if text.shape[1] != self.sizes.text_tokens:
            raise ShapeError(
                f"the text embedding has {text.shape[1]} tokens, and this export takes {self.sizes.text_tokens}",
                available=f"{self.sizes.text_tokens} text tokens",
                fix=f"call the pipeline with max_sequence_length={self.sizes.text_tokens}, or export again with "
                f"--text-tokens {text.shape[1]}",
            )


class HunyuanVideoAdapter(Adapter):
    """The adapter of HunyuanVideo, which ignores the guidance scale for models that have no input for it.

    The pipeline always passes the guidance scale. Only guidance-distilled models have an input for it.

    Args:
        family: The model family.
        sizes: The sizes of the export.
        dtype: The dtype of the export.
    """

    def __init__(self, family: Family, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__(family, sizes, dtype)
        if not family.config["guidance_embeds"]:
            self.ignored = ("guidance",)


class CogVideoXAdapter(Adapter):
    """The adapter of CogVideoX.

    The pair ``image_rotary_emb`` becomes the inputs ``rotary_cos`` and ``rotary_sin`` [tokens, head_dim].
    """

    def inputs(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the graph's inputs of the whole batch, see :meth:`Adapter.inputs`.

        Args:
            arguments: The arguments of ``forward`` by name.

        Raises:
            ShapeError: An argument does not fit the graph.
            UnsupportedError: Rotary embeddings were given to a model that adds its position embeddings.
        """
        arguments = dict(arguments)
        rotary = arguments.pop("image_rotary_emb", None)
        if rotary is not None:
            if not self.family.config["use_rotary_positional_embeddings"]:
                raise UnsupportedError(
                    "image_rotary_emb was given to a CogVideoX with additive position embeddings",
                    fix="leave image_rotary_emb out",
                )
            if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
                raise ShapeError(
                    f"image_rotary_emb is {_named(rotary)}", available="a pair of tensors: cosines and sines"
                )
            arguments["rotary_cos"], arguments["rotary_sin"] = rotary
        return super().inputs(arguments)


class LTXVideoAdapter(Adapter):
    """The adapter of LTX-Video.

    ``num_frames``, ``height``, ``width`` and the interpolation scale become the input ``video_coords`` [B, 3, tokens].

    The graph divides coordinates by the base sizes (20 frames, 2048 × 2048 pixels) as diffusers does for a given
    ``video_coords``. The products are computed here in diffusers' order, so that the quotient is the same to the bit.
    """

    base = (20, 2048, 2048)

    def inputs(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the graph's inputs of the whole batch, see :meth:`Adapter.inputs`.

        Args:
            arguments: The arguments of ``forward`` by name.

        Raises:
            ShapeError: The mask or the sizes are missing, or do not fit the graph.
        """
        arguments = dict(arguments)
        axes = {name: arguments.pop(name, None) for name in ("num_frames", "height", "width")}
        scale = arguments.pop("rope_interpolation_scale", None)
        mask = arguments.get("encoder_attention_mask")
        if mask is not None and as_tensor("encoder_attention_mask", mask).ndim != 2:
            raise ShapeError(
                f"encoder_attention_mask has the shape {tuple(as_tensor('encoder_attention_mask', mask).shape)}",
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
            latents = self._latents(arguments)
            sizes = self._sizes(axes, latents)
            arguments["video_coords"] = self.coordinates(latents, sizes, None if scale is None else _factors(scale))
        return super().inputs(arguments)

    def _sizes(self, axes: Mapping[str, Any], latents: Tensor) -> tuple[int, int, int]:
        """Return frames, height and width as whole numbers.

        Raises:
            ShapeError: One is no whole number from 1, or they do not make as many tokens as the latents have.
        """
        numbers = []
        for name, size in axes.items():
            try:
                number = operator.index(size)
            except TypeError:
                number = 0
            if number < 1:
                raise ShapeError(f"{name} is {size!r:.80}", available="a whole number from 1, in latent units")
            numbers.append(number)
        if math.prod(numbers) != latents.shape[1]:
            raise ShapeError(
                f"num_frames, height and width are {' × '.join(map(str, numbers))} and the latents have "
                f"{latents.shape[1]} tokens",
                fix="give the sizes of these latents, in latent units",
            )
        return numbers[0], numbers[1], numbers[2]

    def coordinates(self, latents: Tensor, sizes: tuple[int, int, int], scale: Any) -> Tensor:
        """Return the coordinates of every token: frame, row and column.

        They are multiplied by ``scale`` and the patch, or without a scale by the base sizes.

        Args:
            latents: The latents, which give batch and device.
            sizes: Frames, height and width in latent units.
            scale: Three factors (to seconds and pixels), or None.

        Returns:
            fp32 [B, 3, frames · height · width].
        """
        grid = torch.meshgrid(
            *(torch.arange(size, dtype=torch.float32, device=latents.device) for size in sizes), indexing="ij"
        )
        patch = self.family.patch()
        factors = self.base if scale is None else scale
        steps = (1, 1, 1) if scale is None else patch
        axes = [axis * factor * step for axis, factor, step in zip(grid, factors, steps)]
        return torch.stack(axes).flatten(1)[None].expand(latents.shape[0], -1, -1)


def as_tensor(name: str, value: Any) -> Tensor:
    """Return a value as a dense tensor of real numbers.

    Args:
        name: The name of the value in error messages.
        value: A tensor, or what ``torch.as_tensor`` takes.

    Raises:
        ShapeError: The value is no such tensor.
    """
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"{name} is {_named(value)}", available="a tensor") from error
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
        raise ShapeError(f"{name} is {_named(tensor)}", available="a dense tensor of real numbers")
    return tensor


def _named(value: Any) -> str:
    """Describe a value in a few words, for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "missing" if value is None else f"a {type(value).__name__}"


def _factors(scale: Any) -> tuple[float, float, float]:
    try:
        time, height, width = (float(factor) for factor in scale)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"rope_interpolation_scale is {scale!r:.80}", available="three numbers: time, height, width"
        ) from error
    return time, height, width


ADAPTERS: dict[str, type[Adapter]] = {
    "wan": Adapter,
    "hunyuan-video": HunyuanVideoAdapter,
    "cogvideox": CogVideoXAdapter,
    "ltx-video": LTXVideoAdapter,
}


def get_adapter(family: Family, sizes: Sizes, dtype: torch.dtype) -> Adapter:
    """Return the adapter of a family.

    Args:
        family: The model family.
        sizes: The sizes of the export.
        dtype: The dtype of the export.

    Raises:
        UnsupportedError: The family has no adapter.
    """
    if family.name not in ADAPTERS:
        raise UnsupportedError(f"there is no pipeline adapter for {family.name}", available=ADAPTERS)
    return ADAPTERS[family.name](family, sizes, dtype)
