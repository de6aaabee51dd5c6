"""Generating clips of a prompt table's model, many at once, with the switching rule and step cache of the runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from dvdquant.checkpoint.prompt_table import EMPTY_WORD, PromptTable
from dvdquant.deploy.pipelines.schedulers import open_table_scheduler
from dvdquant.deploy.switching.controller import StepController
from dvdquant.deploy.switching.forecasts import Growth, moved_since
from dvdquant.deploy.switching.gbs import relative_change
from dvdquant.deploy.switching.step_cache import Kept, keep, residual_norm, reuse

__all__ = ["Bench", "Clips", "Recording", "bench_prompts", "generate", "record", "skips_along"]

Prompt = tuple[str, ...]


@dataclass(frozen=True)
class Bench:
    """Holds a trained model and what its clips need.

    Args:
        name: The name of the model.
        model: The transformer in fp32, eval mode.
        table: Its prompts.
        scheduler: Its scheduler.
        steps: The denoising steps that it was trained for.
        guidance: The guidance scale that it was trained for.
    """

    name: str
    model: nn.Module
    table: PromptTable
    scheduler: Any
    steps: int
    guidance: float

    @classmethod
    def open(cls, folder: Path, name: str | None = None) -> Bench:
        """Read a model's folder.

        Args:
            folder: It holds ``transformer/``, ``scheduler/`` and a prompt table.
            name: Name of the model; None for that of the folder.
        """
        table = PromptTable.open(folder)
        model = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()
        model.requires_grad_(False)
        return cls(name or folder.name, model, table, open_table_scheduler(folder), table.steps, table.guidance_scale)

    def words(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return the embeddings of prompts, fp32 [B, slots, text_dim].

        Args:
            prompts: The words of every clip.
        """
        rows = {word: index for index, word in enumerate(self.table.words)}
        ids = torch.tensor([[rows[word] for word in prompt] for prompt in prompts])
        return self.table.embeddings.float()[ids]

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Return the start of every clip, fp32 [B, C, F, H, W]; it is the clip's own whatever it is batched with.

        Args:
            seeds: Seed of every clip.
        """
        return torch.stack([torch.randn(self.table.latent, generator=torch.Generator().manual_seed(s)) for s in seeds])


def bench_prompts(table: PromptTable, count: int, seed: int) -> list[Prompt]:
    """Return different prompts, every word of a slot as often as every other where ``count`` allows.

    Args:
        table: The words that the model knows.
        count: How many prompts.
        seed: Decides which.
    """
    generator = torch.Generator().manual_seed(seed)
    slots = [table.choices[name] for name in table.order]
    found: dict[Prompt, None] = {}
    while len(found) < count:
        columns = []
        for words in slots:
            repeated = [words[i % len(words)] for i in range(count)]
            columns.append([repeated[i] for i in torch.randperm(count, generator=generator)])
        found |= dict.fromkeys(zip(*columns))
    return list(found)[:count]


@dataclass
class Clips:
    """Holds generated clips.

    Args:
        latents: The latents, fp32 [B, C, F, H, W].
        bits: Activation bits of each clip and step, None where a step reused the last output.
        trajectory: Where asked for, (x, output with the prompt) of every step.
    """

    latents: Tensor
    bits: list[list[int | None]]
    trajectory: list[tuple[Tensor, Tensor]]


@torch.inference_mode()
def generate(
    bench: Bench,
    models: Mapping[int, nn.Module],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    controllers: Callable[[int], StepController] | None = None,
    keep_trajectory: bool = False,
) -> Clips:
    """Draw the clips of one batch.

    Args:
        bench: The model's words, noise and scheduler.
        models: Activation bits -> model. With one, every step runs on it.
        prompts: The words of every clip.
        seeds: The seed of every clip.
        controllers: Makes the controller of a clip from its place in the batch; needed with several models.
        keep_trajectory: Whether x and the output with the prompt are kept of every step.
    """
    count = len(prompts)
    text, empty = bench.words(prompts), bench.words([(EMPTY_WORD,) * len(prompts[0])] * count)
    x = bench.noise(seeds)
    scheduler = copy.deepcopy(bench.scheduler)
    scheduler.set_timesteps(bench.steps)
    run = _Switch(bench.steps, models, controllers, count, text, empty) if controllers else None
    only = next(iter(models.values()))
    result = Clips(x, [[] for _ in prompts], [])
    for step, timestep in enumerate(scheduler.timesteps):
        if run is None:
            output = _both(only, x, timestep, text, empty)
            for bits in result.bits:
                bits.append(next(iter(models)))
        else:
            output = run.step(step, timestep, x, result.bits)
        guided = _guided(bench, output)
        if keep_trajectory:
            result.trajectory.append((x, output[0]))
        x = scheduler.step(guided, timestep, x, return_dict=False)[0]
    result.latents = x
    return result


@dataclass(frozen=True)
class Recording:
    """Holds what a model and the fp32 model gave at every step of one clip of the first.

    Args:
        latents: The latents before each step and at the end, fp32 [steps + 1, C, F, H, W].
        outputs: The model's outputs with the prompt and without it, fp32 [steps, 2, C, F, H, W].
        exact: Those of the fp32 model at the same latents.
    """

    latents: Tensor
    outputs: Tensor
    exact: Tensor


class _Both(nn.Module):
    """A model and the fp32 model beside it, whose outputs are kept."""

    def __init__(self, model: nn.Module, exact: nn.Module) -> None:
        super().__init__()
        self.models = (model, exact)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, *given: Any, **named: Any) -> tuple[Tensor]:
        output, exact = (model(x, *given, **named)[0] for model in self.models)
        self.seen.append((x[0], output.float(), exact.float()))
        return (output,)


def record(bench: Bench, model: nn.Module, exact: nn.Module, prompt: Prompt, seed: int) -> Recording:
    """Draw a clip and keep what two models give at its latents.

    Args:
        bench: The words, noise and scheduler.
        model: The model that draws the clip.
        exact: The fp32 model.
        prompt: The words of the clip.
        seed: Its seed.
    """
    both = _Both(model, exact)
    end = generate(bench, {16: both}, [prompt], [seed]).latents
    latents, outputs, beside = (torch.stack(each) for each in zip(*both.seen))
    return Recording(torch.cat((latents, end)), outputs, beside)


class _Recorded(nn.Module):
    """Recorded outputs in the place of a model."""

    outputs: Tensor

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor]:
        return (self.outputs,)


@torch.inference_mode()
def skips_along(
    bench: Bench, recording: Recording, controller: StepController
) -> tuple[list[int | None], float, float]:
    """Return what skipped steps alone do to a recorded clip. No step is computed, and none meets a changed latent.

    A step of length Δσ brings Δσ·(ṽ − v) into the latent, with v as recorded and ṽ what the step cache returns, both guided:
    guidance adds the errors of two branches, and the branch without the prompt need not change as the other does.

    Args:
        bench: The model, for its schedule and guidance.
        recording: The clip.
        controller: It may ask for 8 bits alone.

    Returns:
        The bits of each step, ‖Σ Δσ·(ṽ − v)‖ / ‖x‖ in L2, with x the latent at the end, and the same against the outputs of the
        fp32 model in place of v.
    """
    scheduler = copy.deepcopy(bench.scheduler)
    scheduler.set_timesteps(bench.steps)
    model, word = _Recorded(), torch.zeros(1, 1, 1)
    run = _Switch(bench.steps, {8: model}, lambda _: controller, 1, word, word)
    bits: list[list[int | None]] = [[]]
    lengths = scheduler.sigmas[1:] - scheduler.sigmas[:-1]
    added = torch.zeros_like(recording.latents[0], dtype=torch.float64)
    whole = added.clone()
    for step, timestep in enumerate(scheduler.timesteps):
        model.outputs = recording.outputs[step]
        returned = run.step(step, timestep, recording.latents[step : step + 1], bits)[:, 0]
        added += lengths[step] * _guided(bench, returned - recording.outputs[step])
        whole += lengths[step] * _guided(bench, returned - recording.exact[step])
    size = recording.latents[-1].double().norm()
    return bits[0], float(added.norm() / size), float(whole.norm() / size)


def _guided(bench: Bench, output: Tensor) -> Tensor:
    """Return what guidance makes of the outputs with the prompt and without it, [2, ...]."""
    return output[1] + bench.guidance * (output[0] - output[1])


def _both(model: nn.Module, x: Tensor, timestep: Tensor, text: Tensor, empty: Tensor) -> Tensor:
    """Return the outputs with the prompt and without it, fp32 [2, B, C, F, H, W].

    Args:
        model: The transformer.
        x: The latents, fp32 [B, C, F, H, W].
        timestep: The timestep, a scalar.
        text: Embeddings of the prompts, fp32 [B, slots, text_dim].
        empty: Embeddings of the empty prompt, of the same shape.
    """
    twice = torch.cat((x, x))
    out: Tensor = model(twice, timestep.expand(len(twice)), torch.cat((text, empty)), return_dict=False)[0]
    return out.float().view(2, *x.shape)


class _Switch:
    """Lets every clip ask its own controller; clips that want the same bits run together."""

    def __init__(
        self, steps: int, models: Mapping[int, nn.Module], make: Callable[[int], StepController], count: int,
        text: Tensor, empty: Tensor,
    ) -> None:  # fmt: skip
        self.models, self.text, self.empty = models, text, empty
        self.controllers = [make(i) for i in range(count)]
        for controller in self.controllers:
            controller.reset(steps)
        self.last: list[Tensor | None] = [None] * count  # F_t of the branch that decides: the one with the prompt
        self.kept: list[Kept | None] = [None] * count
        self.latents: list[Tensor | None] = [None] * count  # x of the last step
        # v and x of the last computed step that may be reused
        self.reused: list[tuple[Tensor, Tensor] | None] = [None] * count

    def step(self, step: int, timestep: Tensor, x: Tensor, bits: list[list[int | None]]) -> Tensor:
        """Return the outputs of a step, fp32 [2, B, C, F, H, W], and add its bits to those of every clip.

        Args:
            step: The number of the step, from 0.
            timestep: Its timestep, a scalar.
            x: The latents, fp32 [B, C, F, H, W].
            bits: The bits of every clip and step so far; None where a step reused the last output.
        """
        moved = [
            moved_since(x[i], last, None if j is None else j[1])
            for i, (last, j) in enumerate(zip(self.latents, self.reused))
        ]
        decided = [c.decide("cond", step, float(timestep), m).bits for c, m in zip(self.controllers, moved)]
        output = torch.empty(2, *x.shape)
        for each in {d for d in decided if d is not None}:
            chosen = torch.tensor([i for i, d in enumerate(decided) if d == each])
            output[:, chosen] = _both(self.models[each], x[chosen], timestep, self.text[chosen], self.empty[chosen])
        for i, (controller, width) in enumerate(zip(self.controllers, decided)):
            cache, growth, change, reused_change = controller.cache, Growth(), None, None
            if width is None:
                kept = self.kept[i]
                assert kept is not None
                output[:, i] = reuse(kept, torch.stack((x[i], x[i])), float(timestep))
            else:
                last, before, own = self.last[i], self.reused[i], output[:, i].clone()
                deciding = own[0]
                if last is not None:
                    change = relative_change(deciding, last)
                if before is not None:
                    v, latent = before
                    reused_change = None if v is last else relative_change(deciding, v)
                    grown = float(deciding.abs().sum() / v.abs().sum())
                    growth = Growth(grown, float(residual_norm(deciding, x[i]) / residual_norm(v, latent)))
                self.last[i] = deciding
                if cache is not None and width >= controller.reused_bits:
                    self.reused[i], twice = (deciding, x[i]), torch.stack((x[i], x[i]))
                    self.kept[i] = keep(own, twice, cache.residual, float(timestep), width, self.kept[i])
            controller.ran("cond", step, float(timestep), width, change, moved[i], growth, reused_change)
            self.latents[i] = x[i]
            bits[i].append(width)
        return output
