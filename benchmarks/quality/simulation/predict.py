"""Inputs of the quantized layers of a Wan model, predicted from its weights alone: nothing is generated, no data is read.

A LayerNorm hands on channels of mean 0 and variance 1, whatever it is given; what makes the channels differ is the
modulation, which is known for every timestep. So unit Gaussian tokens through the modulation, the value projections and the
first feed-forward layer have second moments much like the real ones. ``noise_run`` asks the whole model instead, on pure
noise at every timestep and random words.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.outliers import modulation
from benchmarks.quality.simulation.simulate import sampled_inputs
from benchmarks.quality.toy.clips import Bench
from dvdquant.quantize.synthetic_inputs import smooth_field

__all__ = ["noise_run", "predicted_inputs"]

TOKENS = 4096


@torch.inference_mode()
def predicted_inputs(bench: Bench, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Return inputs of the layers, fp32 [tokens, K], by the first member of each.

    Keys and values of cross-attention read the text, which is not predicted: they are left out.

    Args:
        bench: The model and its scheduler.
        tokens: The number of tokens.
    """
    model: Any = bench.model
    bench.scheduler.set_timesteps(bench.steps)
    over_time = modulation(model, bench.scheduler.timesteps)
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(over_time.shape[1], (tokens,), generator=generator)
    width = over_time.shape[-1]

    def unit() -> Tensor:
        x = torch.randn(tokens, width, generator=generator)
        return nn.functional.layer_norm(x, (width,))

    found = {}
    for index, block in enumerate(model.blocks):
        shift, scale, _, c_shift, c_scale, _ = over_time[index][which].unbind(1)
        attention = unit() * (1 + scale) + shift
        found[f"blocks.{index}.attn1.to_q"] = attention
        found[f"blocks.{index}.attn1.to_out.0"] = block.attn1.to_v(attention)
        found[f"blocks.{index}.attn2.to_q"] = unit() * block.norm2.weight + block.norm2.bias
        forward = unit() * (1 + c_scale) + c_shift
        found[f"blocks.{index}.ffn.net.0.proj"] = forward
        found[f"blocks.{index}.ffn.net.2"] = block.ffn.net[0](forward)
    return found


@torch.inference_mode()
def noise_run(bench: Bench, latents: str = "noise", runs: int = 32, kept: int = 128) -> dict[str, Tensor]:
    """Return inputs of the layers, fp32 [runs·kept, K], by the first member of each, from the model itself on N(0, 1) words.

    Args:
        bench: The model and its scheduler.
        latents: ``noise`` is N(0, 1) at every timestep; ``smooth`` is noise mixed as the scheduler does with a smooth random
            field in the place of a clip; ``own`` is what the model makes of noise step by step.
        runs: The number of timesteps.
        kept: The tokens of a timestep.
    """
    generator = torch.Generator().manual_seed(0)
    scheduler = copy.deepcopy(bench.scheduler)
    scheduler.set_timesteps(runs)
    text = bench.table.embeddings.shape[1]
    x = torch.randn(1, *bench.table.latent, generator=generator)
    words = torch.randn(1, len(bench.table.order), text, generator=generator)
    with sampled_inputs(bench.model, kept, generator) as seen:
        for timestep in scheduler.timesteps:
            if latents != "own":
                words = torch.randn(words.shape, generator=generator)
                x = torch.randn(x.shape, generator=generator)
            if latents == "smooth":
                x = torch.lerp(smooth_field(x.shape, generator), x, float(timestep) / 1000)
            v = bench.model(x, timestep.expand(1), words, return_dict=False)[0]
            if latents == "own":
                x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return {name: torch.cat(rows) for name, rows in seen.items()}
