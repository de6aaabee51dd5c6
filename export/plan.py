"""The plan of an export: what is read, which layers are quantized, at which sizes, and which engines are built."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

from dvdquant import __version__
from dvdquant.artifact.entries import Source
from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.output_folder import check_output
from dvdquant.checkpoint.formats.files import check_order
from dvdquant.checkpoint.lora.fuse import components_of, model_fingerprint, with_loras
from dvdquant.checkpoint.opening import open_checkpoint, read_config_file
from dvdquant.checkpoint.pipeline_facts import with_pipeline_facts
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.errors import CheckpointError, EngineError, UnsupportedError
from dvdquant.export.engines import load_backend
from dvdquant.export.engines.attention import attention_wish
from dvdquant.export.engines.precision import EnginePlan, check_sms, plan_engines
from dvdquant.export.estimate import Estimate, estimate_export, lowered_bytes
from dvdquant.export.layouts.agree import check_layouts
from dvdquant.export.layouts.comfy import comfy_bytes
from dvdquant.export.options import ExportOptions, check_text, recorded_model, with_table_defaults
from dvdquant.export.replacement import check_replacement
from dvdquant.export.sizes import resolve_sizes
from dvdquant.model.families import Sizes
from dvdquant.model.plan import ModelPlan, plan_model
from dvdquant.plugin_library import check_plugin
from dvdquant.quantize.checkpoint import (
    check_weights,
)
from dvdquant.system.gpu import read_gpu
from dvdquant.system.plugin_file import read_plugin
from dvdquant.system.safetensors_reader import DTYPES
from dvdquant.text import shown

__all__ = ["ExportPlan", "check_previous", "plan_export", "shapes_of", "source_of"]


@dataclass(frozen=True)
class ExportPlan:
    """The plan of an export, made before anything is written.

    Args:
        options: The options of the export.
        components: The names of the transformers' folders.
        checkpoints: The checkpoints, one per transformer, in the order of ``components``.
        plans: The plans of the models, one per transformer, in the same order.
        sizes: The sizes of the graphs, in latent units.
        engines: The engines that are built for each transformer.
        later: The engines that are left to the machine that they are for.
        versions: The version of each engine builder that is needed, by its name.
        estimate: The disk space, memory and time that the export takes.
    """

    options: ExportOptions
    components: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    plans: tuple[ModelPlan, ...]
    sizes: Sizes
    engines: tuple[EnginePlan, ...]
    versions: dict[str, str]
    estimate: Estimate
    later: tuple[EnginePlan, ...] = ()

    @property
    def makes_nvfp4(self) -> bool:
        """Return whether an engine has NVFP4 weights, which are made from the original ones after all layers are quantized."""
        return any(engine.precision == "nvfp4" for engine in (*self.engines, *self.later))

    @property
    def key(self) -> dict[str, Any]:
        """Return the values that weights and graphs depend on; engines are matched one by one."""
        options = self.options
        return {
            "checkpoints": [c.fingerprint() for c in self.checkpoints],
            "components": list(self.components),
            "recipe": options.recipe.to_json(),
            # The decisions of the recipe about each layer; another version of its rules may decide otherwise.
            "layers": [[[s.name, s.rotation.block, s.groups] for s in plan.layers] for plan in self.plans],
            "dtype": options.dtype,
            "sizes": self.sizes.to_json(),
            "qdq_graphs": "onnx" in options.targets,
            "allow_nonfinite": options.allow_nonfinite,
            **({"lora_rank": options.lora_rank} if options.lora_rank else {}),
            "device": options.torch_device.type,  # codes at rounding ties depend on the order of sums
            "dvdquant": __version__,
        }


def plan_export(options: ExportOptions) -> ExportPlan:
    """Open the checkpoint, decide layers, sizes and engines, and estimate; this writes nothing.

    Args:
        options: The options of the export.

    Raises:
        UnsupportedError: An option, the model or a layer is not supported, or no layer is left to quantize.
        EngineError: An engine is to be built here, and its builder or the plugin library is missing, or the plugin
            library is for another major version.
        DvdquantError: Something else is wrong that would make the export fail later and can be known now.
    """
    # 1. Check the options that need no checkpoint.
    check_sms(options.sms)
    check_text(options)
    _ = options.torch_device  # one that is not there is refused before any work
    # 2. Open the checkpoints.
    components, opened = _open_all(options)
    # 3. Plan the layers and the sizes.
    plans = []
    for checkpoint in opened:
        plan = plan_model(checkpoint.config, options.recipe, options.torch_dtype, checkpoint)
        check_weights(checkpoint, plan)
        plan = replace(plan, lora_rank=options.lora_rank)
        if not plan.layers:
            raise UnsupportedError(
                "no layer is left to quantize", available=list(plan.kept_linears)[:5], fix="give fewer --keep globs"
            )
        plans.append(plan)
    sizes = resolve_sizes(plans[0].family, with_table_defaults(options))
    for plan in plans[1:]:
        plan.family.check(sizes)
    check_layouts(options.also_write, plans)
    # 4. Plan the engines.
    engines: list[EnginePlan] = []
    later: list[EnginePlan] = []
    versions = {}
    for backend in options.backends:
        found = plan_engines(
            backend,
            options.sms,
            options.recipe.activations,
            recipe=options.recipe,
            override=options.precision if backend == "tensorrt_rtx" else "auto",
            from_checkpoint=True,
            attention=attention_wish(options.recipe, plans[0].family, sizes),
        )
        if options.builds_elsewhere(backend):
            later += found
        else:
            engines += found
            library = load_backend(backend)
            versions[backend] = library.version
            if library.takes_plugins and options.plugins:
                gpu = read_gpu()
                for path in options.plugins:
                    check_plugin(read_plugin(path), library, gpu)
    if any(e.precision == "plugin" for e in engines) and not options.plugins:
        raise EngineError(
            "TensorRT engines are to be built here, which needs the dvdquant plugin library, and --plugin was not given",
            fix="pass the built library with --plugin, or leave the engines to dvdq-build on the device (--build device)",
        )
    # 5. Check the output folder and estimate.
    previous = check_output(options.out)
    largest = max(
        info.reading_bytes + (c.lora.reading_bytes(info.name, math.prod(info.shape)) if c.lora else 0)
        for c in opened
        for info in c.tensors.values()
    )
    # NVFP4 weights are made from the original ones, of all transformers, after they were quantized.
    sizes_read = [_read_bytes(c) for c in opened]
    nvfp4 = any(engine.precision == "nvfp4" for engine in (*engines, *later))
    again = sum(sizes_read) if nvfp4 else max(sizes_read) if options.recipe.inputs == "synthetic" else 0
    estimate = estimate_export(plans, engines, options, sum(c.nbytes for c in opened), largest, again)
    kept = sum(max((lowered_bytes(p, e) for e in later), default=0) for p in plans)
    kept += sum(comfy_bytes(p, layout) for p in plans for layout in options.also_write)
    estimate = replace(estimate, weight_file_bytes=estimate.weight_file_bytes + kept)
    planned = ExportPlan(
        options, components, opened, tuple(plans), sizes, tuple(engines), versions, estimate, tuple(later)
    )
    check_previous(planned, previous)
    return planned


def _read_bytes(checkpoint: Checkpoint) -> int:
    """Return the memory that all tensors of a checkpoint take as they are read: fp32 where a scale or a LoRA is applied."""
    changed = checkpoint.lora.terms if checkpoint.lora is not None else {}
    return sum(
        math.prod(info.shape) * (4 if name in changed else DTYPES[info.dtype][0])
        for name, info in checkpoint.tensors.items()
    )


def _open_all(options: ExportOptions) -> tuple[tuple[str, ...], tuple[Checkpoint, ...]]:
    """Open every transformer that is meant, with what its pipeline says and with its LoRAs; (components, checkpoints).

    Raises:
        CheckpointError: One cannot be used, or the two of ``--transformer-2`` are not of one class.
        UnsupportedError: ``--transformer-2`` was given, and the model has a second transformer.
    """
    config = None if options.config is None else read_config_file(options.config)
    names = (
        [options.subfolder] if options.subfolder else Checkpoint.components(options.model, revision=options.revision)
    )
    if options.transformer_2 is not None:
        if len(names) > 1 or options.subfolder:
            raise UnsupportedError(
                f"--transformer-2 {shown(options.transformer_2)} was given, and MODEL has a second transformer",
                available=[shown(name) for name in names],
                fix="leave it out, or give the first transformer alone as MODEL",
            )
        check_order(os.path.basename(options.model), os.path.basename(options.transformer_2))
        names = [names[0], "transformer_2"]
    components = tuple(name.rpartition("/")[2] for name in names)
    loras = components_of(options.lora, components)
    opened = []
    for name in components:
        arguments: dict[str, Any] = {"revision": options.revision, "config": config}
        if name == "transformer_2" and options.transformer_2 is not None:
            second = open_checkpoint(options.transformer_2, config=config)
            opened.append(with_loras(replace(with_pipeline_facts(second), component=name), loras[name]))
            continue
        arguments |= {"subfolder": options.subfolder} if options.subfolder else {"component": name}
        opened.append(with_loras(with_pipeline_facts(open_checkpoint(options.model, **arguments)), loras[name]))
    for checkpoint in opened:
        if (few := checkpoint.source.few_bits) and not options.allow_low_bits:
            raise CheckpointError(
                f"{shown(checkpoint.source.file)} holds weights as {', '.join(few)}: too few bits are left of them to be "
                "quantized again without a loss that is seen",
                available="Q8_0, Q6_K, F16, BF16, F32",
                fix="use a file with one of these, or take the loss: --allow-low-bits",
            )
    if len({checkpoint.class_name for checkpoint in opened}) > 1:
        raise CheckpointError(
            f"the transformers are of several classes: {', '.join(c.class_name for c in opened)}",
            fix="give the two transformers of one model",
        )
    return components, tuple(opened)


def check_previous(plan: ExportPlan, previous: Manifest | None) -> None:
    """Refuse to replace a finished export by another one, unless the options ask for that.

    Args:
        plan: The plan of the export.
        previous: The manifest of the export in its folder, or None.

    Raises:
        OutputError: The folder holds an export of another model, another recipe or other sizes.
    """
    if previous is not None and not plan.options.replace:
        out, recipe = plan.options.out, plan.options.recipe
        rank = plan.options.lora_rank
        check_replacement(out, previous, source_of(plan), plan.components, recipe, shapes_of(plan), rank)


def shapes_of(plan: ExportPlan) -> dict[str, Any]:
    """Return the sizes and the dtype of the graphs, in the form of the manifest.

    Args:
        plan: The plan of the export.
    """
    return {**plan.sizes.to_json(), "dtype": plan.options.dtype}


def source_of(plan: ExportPlan) -> Source:
    """Return where the weights come from and what was recognised of their format, in the form of the manifest.

    Args:
        plan: The plan of the export.

    Raises:
        CheckpointError: A file of the model has gone or has changed since it was opened.
    """
    first = plan.checkpoints[0]
    source = Source(
        model=recorded_model(plan.options.model),
        class_name=first.class_name,
        fingerprint=model_fingerprint(plan.checkpoints),
        format="; ".join(dict.fromkeys(c.source.layout for c in plan.checkpoints)),
        precision="; ".join(dict.fromkeys(c.source.precision for c in plan.checkpoints)),
        notes=list(dict.fromkeys(note for c in plan.checkpoints for note in c.source.notes)),
        diffusers_folder=first.source.diffusers_folder,
        few_bits=list(dict.fromkeys(kind for c in plan.checkpoints for kind in c.source.few_bits)),
    )
    if plan.options.transformer_2 is not None:
        source["transformer_2"] = recorded_model(plan.options.transformer_2)
    if plan.options.pipeline is not None:
        source["pipeline"] = recorded_model(plan.options.pipeline)
    if plan.options.config is not None:
        source["config"] = recorded_model(str(plan.options.config))
    return source
