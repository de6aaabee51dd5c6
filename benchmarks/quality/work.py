"""What one process of the quality benchmark does: clips, errors step by step, and the fp32 clips they are held against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.compared.methods import METHODS, Method
from benchmarks.quality.compared.studies import STUDIES
from benchmarks.quality.simulation.compiled import CompiledModel, EagerModel
from benchmarks.quality.simulation.predict import noise_run, predicted_inputs
from benchmarks.quality.simulation.simulate import Layer, Simulated, layers_of, sampled_inputs
from benchmarks.quality.toy.clips import Bench, Clips, Prompt, Recording, bench_prompts, generate, record
from benchmarks.quality.toy.shapes import CHOICES, measure
from benchmarks.switching.measure import place_high
from benchmarks.switching.metrics import ssim
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.prompt_table import frames_from_latents
from dvdquant.deploy.generation.psnr import psnr
from dvdquant.deploy.switching.controller import StepController
from dvdquant.deploy.switching.factory import make_controller
from dvdquant.deploy.switching.gbs import Weighting, delta_for_average_bits, relative_change, weighted_changes
from dvdquant.deploy.switching.step_cache import StepCachePolicy
from dvdquant.model.plan import plan_model
from dvdquant.quantize.hessian import InputHessian, synthetic_hessians
from dvdquant.recipe import RECIPES
from dvdquant.system.progress import Progress
from dvdquant.system.whole_file import atomic_path, write_whole

__all__ = ["HELD_OUT", "Worker", "find_method", "generate_chunk", "plan"]

_controller = partial(make_controller, component="transformer", family="wan", bits=(4, 8))

Row = dict[str, Any]
# Clips whose trajectories and inputs are looked at: other prompts and seeds than those that are scored.
HELD_OUT, HELD_OUT_SEED = 8, 1_000_000
CALIBRATION_TOKENS = 1024
# Clips generated together: few enough to stay in the cache of a core.
TOGETHER = 4
# Speed is drawn between 1 and 1.5 pixels a frame; half a pixel more on both sides is still that motion.
SPEED = (0.5, 2.0)


def plan(bench: Bench, prompts: int, seeds: int) -> list[tuple[Prompt, int]]:
    """Return (prompt, seed) of every scored clip; the prompts are the same whatever the number of seeds.

    Args:
        bench: The model, for the words that it knows.
        prompts: How many prompts.
        seeds: Clips of each prompt.
    """
    chosen = bench_prompts(bench.table, prompts, seed=0)
    return [(prompt, 1000 * turn + index) for turn in range(seeds) for index, prompt in enumerate(chosen)]


@dataclass
class Worker:
    """Does the jobs of one process with one thread.

    Args:
        folders: The folder of every model by its name.
        work: The folder of what all processes share.
        steps_each: The denoising steps of a clip.
        eager: Whether the models are not compiled.
    """

    folders: dict[str, Path]
    work: Path
    steps_each: int
    eager: bool = False
    benches: dict[str, Bench] = field(default_factory=dict)
    layers: dict[tuple[str, bool], list[Layer]] = field(default_factory=dict)
    hessian: dict[str, dict[str, InputHessian]] = field(default_factory=dict)
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    built: dict[tuple[str, str, int], nn.Module] = field(default_factory=dict)
    compiled: dict[tuple[str, bool], CompiledModel | EagerModel] = field(default_factory=dict)

    def bench(self, model: str) -> Bench:
        """Return the model with its words and scheduler, read once.

        Args:
            model: Name of the model, a key of ``folders``.
        """
        if model not in self.benches:
            self.benches[model] = replace(Bench.open(self.folders[model], model), steps=self.steps_each)
        return self.benches[model]

    # ------------------------------------------------------------------------------------------ what is prepared once

    def held_out(self, model: str) -> None:
        """Write trajectories and layer inputs of the held-out clips to ``work``, where they are not there yet.

        Args:
            model: Name of the model, a key of ``folders``.
        """
        path = self.work / f"{model}-held-out.pt"
        if path.exists():
            return
        bench = self.bench(model)
        prompts = bench_prompts(bench.table, HELD_OUT, seed=1)
        seeds = [HELD_OUT_SEED + i for i in range(HELD_OUT)]
        with sampled_inputs(bench.model, 32, torch.Generator().manual_seed(2)) as seen:
            clips = generate(bench, {16: bench.model}, prompts, seeds, keep_trajectory=True)
        inputs = {
            name: torch.cat(tokens)[:: max(1, 32 * bench.steps // CALIBRATION_TOKENS)] for name, tokens in seen.items()
        }
        _save(path, {"prompts": prompts, "trajectory": clips.trajectory, "inputs": inputs})

    def _held(self, model: str) -> dict[str, Any]:
        """Return what :meth:`held_out` left, read once."""
        if model not in self.held:
            self.held[model] = torch.load(self.work / f"{model}-held-out.pt")
        return self.held[model]

    def model_layers(self, model: str, studied: bool = False) -> list[Layer]:
        """Return the layers with their calibration inputs.

        Args:
            model: Name of the model, a key of ``folders``.
            studied: Whether they carry every prediction of their inputs that a study compares.
        """
        if (model, studied) not in self.layers:
            bench, predicted = self.bench(model), {}
            if studied:
                predicted = {"modulation": predicted_inputs(bench)}
                for title, latents in (("noise run", "noise"), ("smooth run", "smooth"), ("own run", "own")):
                    predicted[title] = noise_run(bench, latents)
            inputs, hessian = self._held(model)["inputs"], self._hessian(model)
            self.layers[model, studied] = layers_of(bench.model, inputs, predicted, hessian)
        return self.layers[model, studied]

    def _hessian(self, model: str) -> dict[str, InputHessian]:
        """Return what an export of this model predicts of its layers' inputs."""
        if model not in self.hessian:
            checkpoint = open_checkpoint(self.folders[model])
            planned = plan_model(checkpoint.config, RECIPES["w4a4"], torch.float32)
            self.hessian[model] = synthetic_hessians(checkpoint, planned, Progress("quiet"))
        return self.hessian[model]

    def simulated(self, model: str, method: Method, bits: int, studied: bool = False) -> nn.Module:
        """Return the model under a method; the two last used are kept.

        Args:
            model: Name of the model, a key of ``folders``.
            method: How the layers are quantized.
            bits: Bits of the activations.
            studied: As of :meth:`model_layers`.
        """
        key = (model, method.name, bits)
        if key not in self.built:
            while len(self.built) > 1:
                self.built.pop(next(iter(self.built)))
            layers = self.model_layers(model, studied)
            with torch.no_grad():
                self.built[key] = self._compiled(model).install(layers, lambda layer: method.layer(layer, bits))
        return self.built[key]

    def _compiled(self, model: str, wide: bool = False) -> CompiledModel | EagerModel:
        if (model, wide) not in self.compiled:
            bench = self.bench(model)
            kind = EagerModel if self.eager else CompiledModel
            self.compiled[model, wide] = kind(bench.model, layers_of(bench.model), wide)
        return self.compiled[model, wide]

    def unquantized(self, model: str, wide: bool) -> nn.Module:
        """Return the model in bf16 as it would be deployed, or in fp32.

        Args:
            model: Name of the model, a key of ``folders``.
            wide: Whether in fp32.
        """
        compiled = self._compiled(model, wide)
        return compiled.install(compiled.layers, lambda layer: Simulated(layer.weight))

    # ------------------------------------------------------------------------------------------------------ the jobs

    def reference(self, model: str, index: int, chunk: Sequence[tuple[Prompt, int]]) -> list[Row]:
        """Draw the fp32 clips of a chunk, keep them in ``work`` for the other jobs, and return their rows.

        Args:
            model: Name of the model, a key of ``folders``.
            index: Number of the chunk, which names its fp32 clips in ``work``.
            chunk: (prompt, seed) of every clip.
        """
        bench = self.bench(model)
        clips = generate_chunk(bench, {16: self.unquantized(model, wide=True)}, chunk)
        _save(self._latents(model, index), clips.latents)
        return self.score(model, "fp32", "A16", index, chunk, clips)

    def _latents(self, model: str, index: int) -> Path:
        return self.work / f"{model}-fp32-{index}.pt"

    def clips(self, model: str, name: str, width: str, index: int, chunk: Sequence[tuple[Prompt, int]]) -> list[Row]:
        """Draw and score clips of a method at one width.

        Args:
            model: Name of the model, a key of ``folders``.
            name: Name of the method.
            width: Width of the activations, ``A`` and bits, such as ``A8``.
            index: Number of the chunk, which names its fp32 clips in ``work``.
            chunk: (prompt, seed) of every clip.

        Raises:
            KeyError: There is no such method, or its package is not installed.
        """
        bench, bits = self.bench(model), int(width[1:])
        if name == "bf16":
            clips = generate_chunk(bench, {16: self.unquantized(model, wide=False)}, chunk)
            return self.score(model, name, width, index, chunk, clips)
        method = find_method(name)
        if bits != 6 or not method.switched:
            clips = generate_chunk(bench, {bits: self.simulated(model, method, bits)}, chunk)
        else:
            delta = self.delta(model, method, 6.0)
            rule: dict[str, Any] = {"last_high": method.last_high, "weighting": method.weighting}
            clips = self.switched_clips(model, method, chunk, lambda _: _controller("switch", delta=delta, **rule))
        return self.score(model, name, width, index, chunk, clips)

    def switched_clips(self, model: str, method: Method, chunk: Sequence[tuple[Prompt, int]], make: Any) -> Clips:
        """Draw clips of a method that switches between 4- and 8-bit activations.

        Args:
            model: Name of the model, a key of ``folders``.
            method: How the layers are quantized.
            chunk: (prompt, seed) of every clip.
            make: Makes the controller of a clip from its place in the batch.
        """
        models = {bits: self.simulated(model, method, bits) for bits in (4, 8)}
        return generate_chunk(self.bench(model), models, chunk, make)

    def delta_clips(
        self, model: str, name: str, variant: dict[str, Any], index: int, chunk: Sequence[tuple[Prompt, int]]
    ) -> list[Row]:
        """Draw and score clips under one setting of the switch, the cache, or a fixed placement of 8-bit steps.

        Args:
            model: Name of the model, a key of ``folders``.
            name: Name of the method.
            variant: The setting: ``delta`` with ``last_high``, ``weighted`` and ``cache``, or ``place`` with ``high``;
                and its ``name``.
            index: Number of the chunk, which names its fp32 clips in ``work``.
            chunk: (prompt, seed) of every clip.
        """
        method, steps = find_method(name), self.bench(model).steps

        def make(_: int) -> StepController:
            if "place" in variant:
                return _controller("planned", schedule=place_high(variant["place"], variant["high"], steps))
            cache = StepCachePolicy(0.02) if variant.get("cache") else None
            weighting: Weighting = "step" if variant.get("weighted") else "none"
            rule: dict[str, Any] = {"last_high": variant.get("last_high", 0), "weighting": weighting}
            return _controller("switch", delta=variant["delta"], cache=cache, **rule)

        rows = self.score(model, name, "A6", index, chunk, self.switched_clips(model, method, chunk, make))
        extra = {"kind": "delta", "name": variant["name"], "delta": variant.get("delta"), "method": name}
        return [{**row, **extra} for row in rows]

    def recording(self, model: str, name: str, width: str, clip: int) -> Recording:
        """Return a held-out clip of a method with the outputs of fp32 at its latents, drawn once and kept in ``work``.

        Args:
            model: Name of the model, a key of ``folders``.
            name: Name of the method.
            width: Width of the activations, ``A`` and bits, such as ``A8``.
            clip: The number of the clip, below ``HELD_OUT``.
        """
        path = self.work / f"{model}-{name.replace(' ', '-')}-{width}-recorded-{clip}.pt"
        if not path.exists():
            bench, simulated = self.bench(model), self.simulated(model, find_method(name), int(width[1:]))
            prompt = bench_prompts(bench.table, HELD_OUT, seed=1)[clip]
            made = record(bench, simulated, self.unquantized(model, wide=True), prompt, HELD_OUT_SEED + clip)
            _save(path, vars(made))
        return Recording(**torch.load(path))

    def steps(self, model: str, name: str, width: str) -> list[Row]:
        """Return the relative L2 of the output at every second step and the last, on held-out fp32 trajectories.

        Args:
            model: Name of the model, a key of ``folders``.
            name: Name of the method.
            width: Width of the activations, ``A`` and bits, such as ``A8``.
        """
        if name == "bf16":
            simulated = self.unquantized(model, wide=False)
        else:
            simulated = self.simulated(model, find_method(name), int(width[1:]))
        errors = self.step_errors(model, simulated, 2)
        base = {"kind": "step", "model": model, "method": name, "width": width}
        return [{**base, "clip": c, "step": s, "sigma": sigma, "error": e} for c, s, sigma, e in errors]

    def study(self, model: str, study: str, name: str, width: str) -> list[Row]:
        """Return the mean relative L2 over every fourth step of each held-out clip, for one entry of a study.

        Args:
            model: Name of the model, a key of ``folders``.
            study: Name of the study.
            name: Name of its entry.
            width: Width of the activations, ``A`` and bits, such as ``A8``.

        Raises:
            KeyError: There is no such study or entry.
        """
        method = Method(f"{study}/{name}", STUDIES[study][name])
        errors = self.step_errors(model, self.simulated(model, method, int(width[1:]), studied=True), 4)
        base = {"kind": "study", "study": study, "model": model, "name": name, "width": width}
        clips = sorted({c for c, *_ in errors})
        means = {c: [e for clip, _, _, e in errors if clip == c] for c in clips}
        return [{**base, "clip": c, "error": sum(means[c]) / len(means[c])} for c in clips]

    @torch.inference_mode()
    def step_errors(self, model: str, simulated: nn.Module, every: int) -> list[tuple[int, int, float, float]]:
        """Return (clip, step, σ, relative L2) of the model's output on the fp32 trajectory of the held-out clips.

        Args:
            model: Name of the model, a key of ``folders``.
            simulated: The model that is held against it.
            every: Every how many steps; the last step is always measured.
        """
        bench = self.bench(model)
        held = self._held(model)
        text = bench.words(held["prompts"])
        bench.scheduler.set_timesteps(bench.steps)
        found = []
        for step, timestep in enumerate(bench.scheduler.timesteps):
            if step % every and step != bench.steps - 1:
                continue
            x, exact = held["trajectory"][step]
            y = simulated(x, timestep.expand(len(x)), text, return_dict=False)[0].float()
            error = (y - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
            found += [(c, step, float(timestep) / 1000, float(e)) for c, e in enumerate(error)]
        return found

    @torch.inference_mode()
    def delta(self, model: str, method: Method, average: float) -> float:
        """Return the δ that gives an average of bits, planned on the held-out trajectories and kept in ``work``.

        Args:
            model: Name of the model, a key of ``folders``.
            method: How the layers are quantized.
            average: Mean bits of the activations over the steps, from 4 to 8.
        """
        path = self.work / f"{model}-{method.name}-{method.last_high}-{method.weighting}-{average:g}.delta"
        if path.exists():
            return float(path.read_text())
        bench = self.bench(model)
        held = self._held(model)
        text = bench.words(held["prompts"])[:4]
        bench.scheduler.set_timesteps(bench.steps)
        outputs: dict[int, list[Tensor]] = {}
        for bits in (4, 8):
            simulated = self.simulated(model, method, bits)
            outputs[bits] = [
                simulated(x[:4], t.expand(4), text, return_dict=False)[0].float()
                for (x, _), t in zip(held["trajectory"], bench.scheduler.timesteps)
            ]
        recordings = [
            {
                (a, b): [relative_change(outputs[b][t][c], outputs[a][t - 1][c]) for t in range(1, bench.steps)]
                for a in (4, 8)
                for b in (4, 8)
            }
            for c in range(4)
        ]
        timesteps = [float(t) for t in bench.scheduler.timesteps]
        weighted = [weighted_changes(r, timesteps, bench.steps, method.weighting) for r in recordings]
        delta, _ = delta_for_average_bits(weighted, average, last_high=method.last_high)
        write_whole(path, repr(delta).encode())
        return delta

    def score(
        self, model: str, name: str, width: str, index: int, chunk: Sequence[tuple[Prompt, int]], clips: Clips
    ) -> list[Row]:
        """Score clips against the fp32 clips of the same chunk, which are drawn where they are gone.

        Args:
            model: Name of the model, a key of ``folders``.
            name: Name of the method, for the rows.
            width: Width of the activations, ``A`` and bits, for the rows.
            index: Number of the chunk, which names its fp32 clips in ``work``.
            chunk: (prompt, seed) of every clip.
            clips: The clips of the chunk, latents [clips, C, F, H, W].

        Returns:
            A row for every clip: PSNR in dB (None where it equals the fp32 one), SSIM, mean bits of the computed steps, and
            which words of the prompt can be read in it.
        """
        if not self._latents(model, index).exists():  # rows of an earlier run, whose clips are gone
            self.reference(model, index, chunk)
        references = torch.load(self._latents(model, index))
        rows = []
        for (prompt, seed), latents, reference, bits in zip(chunk, clips.latents, references, clips.bits):
            reading = measure(latents)
            right = {kind: reading.words[kind] == word for kind, word in zip(CHOICES, prompt)}
            right["speed"] = SPEED[0] <= reading.speed <= SPEED[1]
            frames, exact = (frames_from_latents(t[None]) for t in (latents, reference))
            same = name == "fp32" or bool((frames == exact).all())
            computed = [b for b in bits if b is not None]
            rows.append(
                {
                    "kind": "clip", "model": model, "method": name, "width": width, "prompt": " ".join(prompt),
                    "seed": seed, "psnr": None if same else psnr(frames, exact), "ssim": ssim(frames, exact),
                    "bits": sum(computed) / len(computed), "computed": len(computed) / len(bits), "right": right,
                    "visible": reading.visible, "smoothness": reading.smoothness, "dynamic": reading.dynamic,
                }
            )  # fmt: skip
        return rows


def find_method(name: str) -> Method:
    """Return a method by its name: one of ours, or one that an installed package computes.

    Args:
        name: Name of the method.

    Raises:
        KeyError: There is no such method, or its package is not installed.
    """
    if name in METHODS:
        return METHODS[name]
    from benchmarks.quality.compared.peers import available_peers

    layer, widths = available_peers()[name]
    return Method(name, layer, widths)


def generate_chunk(
    bench: Bench, models: Mapping[int, nn.Module], chunk: Sequence[tuple[Prompt, int]], make: Any = None
) -> Clips:
    """Draw the clips of a chunk, a few at a time.

    Args:
        bench: The model's words, noise and scheduler.
        models: Activation bits -> model. With one, every step runs on it.
        chunk: (prompt, seed) of every clip.
        make: Makes the controller of a clip from its place in the batch; None for no switching.
    """
    parts = [generate(bench, models, *_columns(chunk[i : i + TOGETHER]), make) for i in range(0, len(chunk), TOGETHER)]
    return Clips(torch.cat([p.latents for p in parts]), [b for p in parts for b in p.bits], [])


def _columns(chunk: Iterable[tuple[Prompt, int]]) -> tuple[list[Prompt], list[int]]:
    pairs = list(chunk)
    return [p for p, _ in pairs], [s for _, s in pairs]


def _save(path: Path, value: Any) -> None:
    """Save a value with torch.save, whole or not at all: another process may be reading."""
    with atomic_path(path) as partial:
        torch.save(value, partial)
