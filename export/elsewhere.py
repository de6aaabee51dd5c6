"""Engines for a machine that is elsewhere: what ``dvdq-build`` there needs to know, and the line of NVIDIA's own builder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dvdquant.artifact.entries import BuildEntry
from dvdquant.artifact.layout import PLUGIN_PLACE, graph_path
from dvdquant.export.engines.precision import EnginePlan
from dvdquant.export.engines.report import Shapes
from dvdquant.export.engines.stage import is_compatible, lowered_path
from dvdquant.export.estimate import builder_bytes, held_bytes
from dvdquant.export.graph.trace import profile_shapes
from dvdquant.export.options import ExportOptions
from dvdquant.export.plan import ExportPlan
from dvdquant.model.families import Sizes
from dvdquant.model.kept_inputs import kept_inputs_bytes
from dvdquant.model.plan import ModelPlan
from dvdquant.model.working_memory import step_bytes_at
from dvdquant.text import shell_line

__all__ = ["COMPATIBLE", "SCRIPT", "build_entry", "build_script", "planned_lines", "same_build", "trtexec_line"]

SCRIPT = "trtexec.sh"
"""The script of an export that builds its TensorRT engines without Python."""
COMPATIBLE = ("--versionCompatible", "--excludeLeanRuntime")
"""The options of trtexec for an engine that the lean runtime runs, without a runtime inside it."""


def build_entry(
    component: str,
    engine: EnginePlan,
    graph: str,
    plan: ModelPlan,
    sizes: Sizes,
    options: ExportOptions,
    hashes: Mapping[str, str],
    fp8_attentions: int,
    fused_layers: int = 0,
) -> BuildEntry:
    """Return what the manifest says of one engine that is built elsewhere.

    Args:
        component: The name of the transformer's folder.
        engine: The engine.
        graph: The path of the graph for its builder, relative to the export.
        plan: The plan of the model.
        sizes: The sizes of the graphs, in latent units.
        options: The options of the export.
        hashes: Relative path -> SHA-256 of each QuantLinear graph.
        fp8_attentions: The number of attentions that the graph has in FP8.
        fused_layers: The number of layers that it has fused with what comes before them.
    """
    shapes = profile_shapes(plan.family, sizes)
    path = engine.path(component)
    return BuildEntry(
        engine=path,
        component=component,
        graph=graph,
        backend=engine.backend,  # type: ignore[typeddict-item]
        sm=list(engine.sms),
        act_bits=engine.act_bits,
        precision=engine.precision,
        executes=engine.executes,
        onnx_sha256=hashes[graph_path(component, engine.act_bits, "tensorrt")],
        profile=None if shapes is None else {name: [list(shape) for shape in three] for name, three in shapes.items()},
        fp8_attentions=fp8_attentions,
        fused_layers=fused_layers,
        version_compatible=is_compatible(engine.backend, options.version_compatible),
        kept_inputs=kept_inputs_bytes(plan, engine.precision == "plugin"),
        builder_bytes=builder_bytes(plan, engine),
        held_bytes=held_bytes(plan, engine),
        working_bytes=step_bytes_at(plan.family, sizes, sizes.at("opt")),
        optimization_level=options.optimization_level,
        workspace_gib=options.workspace_gib,
        command=trtexec_line(graph, path, shapes, options) if engine.backend == "tensorrt" else "",
    )


def same_build(one: BuildEntry, other: BuildEntry) -> bool:
    """Return whether two entries are of the same engine, built in the same way from the same graph.

    Args:
        one: An entry.
        other: Another entry, perhaps of another version of dvdquant.
    """
    names = ("engine", "onnx_sha256", "precision", "sm", "profile", "optimization_level", "workspace_gib")
    alike = all(bool(one.get(name)) == bool(other.get(name)) for name in ("fused_layers", "version_compatible"))
    alike = alike and one.get("kept_inputs", 0) == other.get("kept_inputs", 0)
    return alike and all(one.get(name) == other.get(name) for name in names)


def planned_lines(plan: ExportPlan, fused: Mapping[str, int] | None) -> dict[str, str]:
    """Return the lines of trtexec that an export will have: path of the engine -> line.

    Args:
        plan: The plan of the export.
        fused: The number of fused layers of each transformer, or None where none is asked for.
    """
    lines = {}
    for component, model_plan in zip(plan.components, plan.plans):
        shapes = profile_shapes(model_plan.family, plan.sizes)
        for engine in plan.later:
            if engine.backend == "tensorrt":
                graph = lowered_path(component, engine, bool(fused and fused[component]))
                lines[engine.path(component)] = trtexec_line(graph, engine.path(component), shapes, plan.options)
    return lines


def trtexec_line(graph: str, engine: str, shapes: Shapes | None, options: ExportOptions) -> str:
    """Return the command that builds an engine on the device without Python, to be run in the folder of the export.

    Args:
        graph: The path of the graph.
        engine: The path that the engine gets.
        shapes: Input name -> its (min, opt, max) shape; None if all sizes are fixed.
        options: The options of the export.
    """
    words = ["trtexec", f"--onnx={graph}", f"--dynamicPlugins={PLUGIN_PLACE}"]
    # TensorRT 11 has no other networks and takes the option without effect; 10 needs it. The packed weights are inputs of the
    # engine, which trtexec would fill with noise: it builds and does not run.
    words += ["--stronglyTyped", "--profilingVerbosity=detailed", "--skipInference"]
    for option, index in (("minShapes", 0), ("optShapes", 1), ("maxShapes", 2)) if shapes else ():
        words.append(f"--{option}=" + ",".join(_shape(name, three[index]) for name, three in (shapes or {}).items()))
    if options.workspace_gib is not None:
        words.append(f"--memPoolSize=workspace:{int(options.workspace_gib * 1024)}M")
    if options.optimization_level is not None:
        words.append(f"--builderOptimizationLevel={options.optimization_level}")
    if options.version_compatible:
        words += COMPATIBLE
    return shell_line([*words, f"--saveEngine={engine}"])


def _shape(name: str, shape: Sequence[int]) -> str:
    """Return the shape of an input as trtexec reads it."""
    return f"{name}:{'x'.join(map(str, shape))}"


def build_script(builds: Sequence[BuildEntry]) -> str | None:
    """Return a shell script that builds the TensorRT engines of a device's SM by trtexec, or None if there is none to build.

    The SM is the script's argument, or what the driver's nvidia-smi says. Where it says none, as on a Jetson Orin, and the
    engines are for several, the script refuses: trtexec builds for the GPU it runs on, whatever the engines were planned for.

    Args:
        builds: The entries of the manifest.
    """
    lines = {sm: [e for e in builds if e["command"] and sm in e["sm"]] for sm in _sms(builds)}
    if not lines:
        return None
    names = ", ".join(lines)
    alone = next(iter(lines)) if len(lines) == 1 else ""
    cases = []
    for sm, entries in lines.items():
        folders = sorted({entry["engine"].rpartition("/")[0] for entry in entries})
        cases += [f"{sm})", shell_line(["mkdir", "-p", *folders]), *(entry["command"] for entry in entries), ";;"]
    return "\n".join(
        [
            "#!/bin/sh",
            "# Builds the TensorRT engines of this export without Python, on the GPU they are for. dvdq-build does the same,",
            "# checks what it builds, and enters it into the manifest, without which dvdq-run takes no engine.",
            f"# sh {SCRIPT} [SM]: the compute capability of this GPU, such as {next(iter(lines))}; else that of nvidia-smi.",
            "set -eu",
            'cd "$(dirname "$0")"',
            f"if [ ! -f {PLUGIN_PLACE} ]; then",
            f'  echo "{SCRIPT}: $PWD/{PLUGIN_PLACE} is missing: make plugin builds it for this machine" >&2',
            "  exit 2",
            "fi",
            "sm=${1:-}",
            'if [ -z "$sm" ]; then',
            "  found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u)",
            '  case "$found" in [0-9].[0-9] | [0-9][0-9].[0-9]) sm=$found ;; esac',
            "fi",
            'case "${sm:-' + alone + '}" in',
            *cases,
            '"")',
            f'  echo "{SCRIPT}: has engines for SM {names}, and nvidia-smi does not say which this GPU has: sh {SCRIPT} SM" >&2',
            "  exit 2",
            "  ;;",
            "*)",
            f'  echo "{SCRIPT}: has engines for SM {names}, not for SM $sm" >&2',
            "  exit 2",
            "  ;;",
            "esac",
            "",
        ]
    )


def _sms(builds: Sequence[BuildEntry]) -> list[str]:
    """Return the compute capabilities that TensorRT engines are built for by trtexec."""
    return sorted({sm for entry in builds if entry["command"] for sm in entry["sm"]}, key=float)
