"""Synthetic inputs on which any video transformer runs: smooth random fields under noise, and random words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dvdquant.model.families import Axis, Family, Sizes

__all__ = ["smooth_field", "synthetic_inputs", "synthetic_sizes"]

# Patches of one item (frames, rows, columns): 128 tokens.
_PATCHES = (2, 8, 8)
_MOST_TOKENS = 8192
# Few, where a family leaves the number open: in models that join text and video they are a hundredth of the tokens.
_TEXT_TOKENS = 32
# What the position table of a model holds beyond this counts as clip tokens do: a config of some bytes may say 65536.
_USUAL_TEXT = 512
# Inputs that pipelines hold constant, at the pipelines' own defaults (guidance 6, in thousandths).
_CONSTANTS = {"guidance": 6000.0, "ofs": 2.0}
_FRAME_RATE = 25


def synthetic_inputs(family: Family, levels: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Make the inputs of one forward on ``levels`` items, by the names of ``family.sample``.

    All are fp32, except those whose dtype is fixed. Item i is a smooth random field in the place of a clip, mixed with
    noise as the family's scheduler does at the i-th of ``levels`` timesteps, from nearly none to pure noise. Channels
    that condition (an encoded image) and embeddings are N(0, 1). There are at most 8192 tokens in all: a model that
    runs at one size only, and a large one, gets fewer items.

    Args:
        family: The family of the model.
        levels: Noise levels, one item of the batch each.
        seed: Seed of all random values.
    """
    sizes, items = synthetic_sizes(family, levels)
    sizes = Sizes(sizes.frames, sizes.height, sizes.width, sizes.text_tokens, batch=items)
    inputs = family.sample(sizes, torch.float32, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    timesteps, noise = _schedule(family, items)
    signal = 1 - noise if family.schedule == "flow" else (1 - noise.square()).sqrt()
    for spec in family.inputs(sizes):
        value = inputs[spec.name]
        if spec.name in _CONSTANTS:
            inputs[spec.name] = torch.full_like(value, _CONSTANTS[spec.name])
        elif spec.kind == "timestep":
            inputs[spec.name] = timesteps.to(value.dtype).view(-1, *[1] * (value.ndim - 1)).expand(value.shape)
        elif spec.kind == "coords":
            inputs[spec.name] = _coordinates(family, sizes)[None].expand(value.shape)
        elif spec.kind == "latent":
            axis = next(i for i, size in enumerate(spec.shape) if i and not isinstance(size, str))
            packed = "tokens" in spec.shape
            clean = smooth_field(
                (items, value.shape[axis], *(_grid(family, sizes) if packed else sizes.at("opt"))), generator
            )
            clean = clean.flatten(2) if packed else clean
            scale = (items, *[1] * (value.ndim - 1))
            mixed = signal.view(scale) * clean.movedim(1, axis) + noise.view(scale) * value
            # Beyond what the model returns lie conditions: they carry no noise, and no clip.
            own = min(family.config.get("out_channels") or value.shape[axis], value.shape[axis])
            value.narrow(axis, 0, own).copy_(mixed.narrow(axis, 0, own))
    return inputs


def synthetic_sizes(family: Family, levels: int) -> tuple[Sizes, int]:
    """Return the sizes of one item, in latents, and the number of items.

    Args:
        family: The model family.
        levels: The number of noise levels that are wanted; long items mean fewer.
    """
    patch, probe, config = family.patch(), family.probe(), family.config
    free = probe == tuple(2 * size for size in patch)
    frames, height, width = (count * size for count, size in zip(_PATCHES, patch)) if free else (patch[0], *probe[1:])
    text = _TEXT_TOKENS
    if config.get("added_kv_proj_dim"):  # diffusers tells image tokens from words by the full number of these
        text = family.default_text_tokens
    elif config.get("max_text_seq_length") and not (free and config.get("use_rotary_positional_embeddings")):
        text = config["max_text_seq_length"]  # the length of its position table
    tokens = family.tokens(frames, height, width) + max(0, text - _USUAL_TEXT)
    items = max(1, min(levels, _MOST_TOKENS // tokens))
    return Sizes(Axis.fixed(frames), Axis.fixed(height), Axis.fixed(width), text_tokens=text), items


def _schedule(family: Family, items: int) -> tuple[Tensor, Tensor]:
    """Return (timesteps [items] up to 1000, standard deviation [items] of the noise in a latent of unit variance)."""
    even = torch.arange(1, items + 1, dtype=torch.float64) / items
    if family.schedule == "flow":
        sigma = 3 * even / (1 + 2 * even)  # the shift of flow-matching schedulers, towards the noisy end
        return (1000 * sigma).float(), sigma.float()
    timesteps = (1000 * even).round().long() - 1
    # The betas of latent diffusion, brought to no signal at all at the last step.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    signal = (1 - betas).cumprod(0).sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return timesteps.float(), (1 - signal[timesteps].square()).clamp(min=0).sqrt().float()


def smooth_field(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return random fields [B, C, F, H, W] whose neighbours are alike, as in a clip; each item has variance 1.

    Args:
        shape: (B, C, F, H, W).
        generator: Source of the random values, on the CPU.
    """
    items, channels, *sizes = shape
    coarse = torch.randn(items, channels, *(max(2, size // 6) for size in sizes), generator=generator)
    field = nn.functional.interpolate(coarse, size=tuple(sizes), mode="trilinear", align_corners=True)
    return field / field.std(dim=(1, 2, 3, 4), keepdim=True)


def _grid(family: Family, sizes: Sizes) -> tuple[int, int, int]:
    """Return the number of tokens along each axis."""
    frames, height, width = (size // patch for size, patch in zip(sizes.at("opt"), family.patch()))
    return frames, height, width


def _coordinates(family: Family, sizes: Sizes) -> Tensor:
    """Return [3, tokens]: seconds, row and column in pixels of every token."""
    axes = [torch.arange(count, dtype=torch.float32) for count in _grid(family, sizes)]
    time, height, width = (scale * patch for scale, patch in zip(family.vae_scale, family.patch()))
    scales = torch.tensor([time / _FRAME_RATE, height, width])
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]) * scales[:, None]
