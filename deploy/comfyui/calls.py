"""The conversion of one ComfyUI call of a Wan model to the arguments of the exported transformer.

Both use the timestep 1000 · σ with the flow shift inside σ, latents [B, C, F, H, W] scaled by the VAE's statistics, and
text embeddings padded with zeros. They differ in four things:

- ComfyUI puts conditions into one batch, in an order that depends on free memory; here a branch is called by name.
- Latents that are no multiple of the patch are padded circularly, and the output is cut.
- The text may be shorter than the export's text length. Wan's text encoders pad with zeros, and so does this.
- Wan 2.2 TI2V gets one timestep per latent frame; its graph has one per token.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.model.families import Family, Sizes

__all__ = ["BranchNames", "Part", "refuse_foreign", "step_of", "wan_arguments"]

# ComfyUI's index of a condition -> the branch by our name. Guiders with more conditions count on.
_BRANCHES = {0: "cond", 1: "uncond"}


@dataclass(frozen=True)
class Part:
    """The rows of a batch that belong to one condition.

    Args:
        branch: The name of the branch.
        start: The first row.
        stop: The row after the last one.
    """

    branch: str
    start: int
    stop: int


@dataclass
class BranchNames:
    """The names of the conditions of one sampling run; a condition keeps its name through all steps.

    Several conditions may have one index (areas, masks). They are told apart by ComfyUI's own ids.
    """

    _seen: dict[int, list[Hashable]] = field(default_factory=dict)

    def parts(self, rows: int, indices: Sequence[int], ids: Sequence[Hashable] | None = None) -> list[Part]:
        """Split a batch into its conditions, the positive one first, whatever ComfyUI's order is.

        Args:
            rows: The number of samples of the batch.
            indices: ``transformer_options["cond_or_uncond"]``: the index of each condition in the batch.
            ids: ``transformer_options["uuids"]``: an id for each of them.

        Raises:
            ShapeError: The rows cannot be shared evenly among the conditions.
        """
        indices = list(indices) or [0]
        if rows % len(indices):
            raise ShapeError(
                f"ComfyUI calls the model with {rows} samples for {len(indices)} conditions",
                fix="take nodes that change the batch inside of the sampler out of the workflow",
            )
        names = ids if ids is not None and len(ids) == len(indices) else [None] * len(indices)
        size = rows // len(indices)
        parts = [
            Part(self._name(index, name), number * size, (number + 1) * size)
            for number, (index, name) in enumerate(zip(indices, names))
        ]
        order = sorted(range(len(parts)), key=lambda number: (indices[number], parts[number].branch))
        return [parts[number] for number in order]

    def _name(self, index: int, identity: Hashable) -> str:
        base = _BRANCHES.get(index, f"condition {index}")
        if identity is None:
            return base
        seen = self._seen.setdefault(index, [])
        if identity not in seen:
            seen.append(identity)
        number = seen.index(identity)
        return base if number == 0 else f"{base} {number + 1}"


def step_of(sigmas: Sequence[float], sigma: float) -> int:
    """Return the index of the step that a call at a noise level belongs to.

    A sampler of higher order also calls between two levels of its list; such a call belongs to the step that has begun.

    Args:
        sigmas: The sampler's noise levels, falling, one more than there are steps.
        sigma: The noise level of the call. It passes through float32, so an equal level may differ in its last bits.
    """
    tolerance = 1e-5 * abs(sigma)
    reached = [step for step, level in enumerate(sigmas[:-1]) if level >= sigma - tolerance]
    return reached[-1] if reached else 0


def wan_arguments(
    latents: Tensor,
    timestep: Tensor,
    text: Tensor | None,
    images: Tensor | None,
    family: Family,
    sizes: Sizes,
) -> dict[str, Any]:
    """Return the arguments of ``WanTransformer3DModel.forward`` for a call as ComfyUI's ``WanModel`` gets it.

    Args:
        latents: Latents with their conditions on the channel axis, [B, C, F, H, W].
        timestep: 1000 · σ, [B], or [B, F] with one for each latent frame.
        text: The text embedding, [B, L, D].
        images: The embeddings of CLIP vision, [B, L, D], or None. Two images follow each other on the axis of length.
        family: The model family of the export.
        sizes: The sizes of the export.

    Raises:
        ShapeError: Latents or text do not fit the export.
        UnsupportedError: The model takes an image embedding and none is connected, or the other way round.
    """
    for name, value in {"latents": latents, "timestep": timestep, "text": text, "images": images}.items():
        if not isinstance(value, Tensor) and (value is not None or name in ("latents", "timestep")):
            raise ShapeError(
                f"the {name} of a call of the model: {type(value).__name__}",
                available="a tensor",
                fix="take out the node that puts something else there",
            )
    channels = family.config["in_channels"]
    if latents.ndim != 5 or latents.shape[1] != channels:
        raise ShapeError(
            f"the latents are {list(latents.shape)}",
            available=f"[batch, {channels}, frames, height, width], conditions included",
            fix="use an empty latent of this kind of model (EmptyHunyuanLatentVideo for Wan), or the export of the "
            "model that the workflow is for",
        )
    padded = pad_to_patch(latents, family.patch())
    arguments: dict[str, Any] = {
        "hidden_states": padded,
        "timestep": _timesteps(timestep, padded, family),
        "encoder_hidden_states": fit_text(text, sizes.text_tokens, family.config["text_dim"]),
    }
    width = family.config.get("image_dim")
    if width and images is None:
        raise UnsupportedError(
            "this export takes an image embedding, and the workflow gives none",
            available=f"the output of CLIP vision, [batch, 257, {width}]",
            fix="connect CLIPVisionEncode to clip_vision_output of WanImageToVideo",
        )
    if width and images is not None:
        both = family.config.get("pos_embed_seq_len")
        arguments["encoder_hidden_states_image"] = (
            images.reshape(-1, both // 2, images.shape[-1]) if both and images.shape[1] == both else images
        )
    # Without image_dim the embedding has no weights to go through: ComfyUI's own model leaves it out as well.
    return arguments


def pad_to_patch(latents: Tensor, patch: Sequence[int]) -> Tensor:
    """Return the latents, continued circularly up to the next multiple of the patch, as ComfyUI's models do.

    Args:
        latents: [B, C, F, H, W].
        patch: The patch size (time, height, width).
    """
    missing = [-size % step for size, step in zip(latents.shape[2:], patch)]
    if not any(missing):
        return latents
    return pad(latents, [value for size in reversed(missing) for value in (0, size)], mode="circular")


def fit_text(text: Tensor | None, tokens: int, width: int) -> Tensor:
    """Return the text embedding at the export's length: padded with zeros, or without its zeros at the end.

    Args:
        text: The embedding, [B, L, D].
        tokens: The text length of the export.
        width: D of the export.

    Raises:
        ShapeError: There is no text, it has another width, or it has more words than the export takes.
    """
    if text is None or text.ndim != 3 or text.shape[-1] != width:
        raise ShapeError(
            "the conditioning holds no text" if text is None else f"the text embedding is {list(text.shape)}",
            available=f"[batch, tokens, {width}]",
            fix="connect the text encoder of this model: CLIPLoader with type wan, or the words of its prompt table",
        )
    missing = tokens - text.shape[1]
    if missing >= 0:
        return pad(text, [0, 0, 0, missing]) if missing else text
    if bool(text[:, tokens:].any()):
        raise ShapeError(
            f"the text embedding has {text.shape[1]} tokens, and this export takes {tokens}",
            available=f"{tokens} text tokens",
            fix=f"shorten the prompt, or export again with --text-tokens {text.shape[1]}",
        )
    return text[:, :tokens]


def refuse_foreign(options: dict[str, Any], control: object, more: dict[str, Any]) -> None:
    """Refuse what changes the inside of a model: an engine has no place for it.

    Args:
        options: ComfyUI's ``transformer_options``.
        control: The output of a ControlNet, or None.
        more: Conditions that are no argument of a plain Wan model.

    Raises:
        UnsupportedError: There is such a thing. The error names it.
    """
    if control is not None:
        _refuse("a ControlNet", "take the ControlNet out")
    for kind in ("patches", "patches_replace"):
        names = [str(name) for name, entries in (options.get(kind) or {}).items() if entries]
        if names:
            _refuse(
                f"a node that patches the blocks of the model ({', '.join(names)})",
                "take it out; skipping of steps is in the Bit schedule node, as cache",
            )
    # Wan 2.2 TI2V has used its mask in the timesteps by now.
    names = [name for name, value in more.items() if value is not None and name != "denoise_mask"]
    if names:
        _refuse(f"the condition {names[0]}", "use the nodes of plain Wan text to video or image to video")


def _refuse(what: str, fix: str) -> None:
    raise UnsupportedError(
        f"{what} does not work with an export: it would act inside of an engine",
        fix=f"{fix}, or use the original checkpoint",
    )


def _timesteps(timestep: Tensor, latents: Tensor, family: Family) -> Tensor:
    """Return one timestep per sample, or per token where ComfyUI gives one per latent frame."""
    if timestep.ndim < 2 or timestep.shape[1] == 1:
        return timestep.reshape(-1).to(torch.float32)
    frames = latents.shape[2]
    if timestep.shape[1] != frames:
        raise ShapeError(f"the timesteps are {list(timestep.shape)}", available=f"[batch] or [batch, {frames}]")
    tokens = family.tokens(*latents.shape[2:])
    return timestep.to(torch.float32).repeat_interleave(tokens // frames, dim=1)
