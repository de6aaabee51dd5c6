"""What the report says in words: untrusted text made showable, the recipe, kept layers, what executes, commands to run."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dvdquant.artifact.entries import EngineEntry
from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.provenance import lora_room, lora_text, sampling_text
from dvdquant.checkpoint.formats.files import names_file
from dvdquant.hardware.capabilities import CAPABILITIES
from dvdquant.model.families.base import ImageInputs
from dvdquant.recipe import fitted_text, looks_at_inputs
from dvdquant.text import shell_word, unsafe, without_secrets

__all__ = [
    "Execution",
    "commands",
    "executions",
    "kept_groups",
    "lora_rows",
    "python_lines",
    "recipe_text",
    "shown",
    "size_text",
]

LONGEST = 600  # characters of one text of the page
NO_IMAGES = ImageInputs()


def shown(value: Any) -> Any:
    """Return ``value`` with every text in it, keys too, fit to be shown.

    Secrets of URLs and known kinds of token are replaced by an ellipsis, control and direction characters by U+FFFD, and a
    text is cut at :data:`LONGEST` characters. Escaping is the template's work.

    Args:
        value: A text, or dicts and lists of them.
    """
    if isinstance(value, str):
        text = without_secrets(value[: 4 * LONGEST])
        text = "".join("\ufffd" if unsafe(c) else c for c in text)
        return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    if isinstance(value, Mapping):
        return {shown(key): shown(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown(item) for item in value]
    return value


# --------------------------------------------------------------------------------------------------------- the recipe


def lora_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """Return (what, how) of LoRAs in the weights, room for others, and recorded defaults; nothing where there are none.

    Args:
        manifest: The manifest of the export.
    """
    rows = [("LoRA", shown(words.removeprefix("LoRA "))) for words in lora_text(manifest.lora)]
    rows += [("LoRAs at run time", words) for words in lora_room(manifest.lora_rank)]
    if manifest.sampling is not None:
        rows.append(("Defaults", sampling_text(manifest.sampling)))
    return rows


def recipe_text(recipe: Mapping[str, Any], family: str) -> list[tuple[str, str]]:
    """Return the rows of a recipe for a model of ``family``: what is quantized, and how.

    Args:
        recipe: The recipe as ``Recipe.to_json()`` returns it.
        family: The name of the model family.
    """
    from dvdquant.model.families import FAMILIES

    weight, rotation = recipe["weight"], recipe["rotation"]
    grid = f"one scale per {weight['group_size']} inputs" if weight["group_size"] else "one scale per output row"
    zero = {
        "midrise": "codes stand for odd multiples of half a step",
        "symmetric": "codes around zero",
        "float": "a zero-point in sixteenths of a step for each group",
        "paper": "one integer zero-point per row",
    }
    solver = {
        "search": "BGR with the best scale of each row searched",
        "paper": "BGR as published",
        "minmax": "round to nearest between minimum and maximum",
    }
    grids = [
        f"{a['bits']} bits, one scale per {'token' if not a['group_size'] else str(a['group_size']) + ' channels'}"
        for a in recipe["activations"]
    ]
    turned = {"auto": "Hadamard, the largest block that divides the row", "full": "Hadamard over the whole row"}
    turned |= {
        "none": "none",
        "regular": "Hadamard (regular, as ConvRot has it), the largest block that divides the row",
    }
    modulation = {"keep": "16 bit", "a8": "4-bit weights, 8-bit activations"}[recipe["modulation"]]
    predicted = "predicted by one run on synthetic latents, no data; codes rounded with feedback for them"
    predicted = ", ".join([predicted, *fitted_text(recipe)])
    has_modulation = any(f.modulation for f in FAMILIES if f.name == family)
    return [
        ("Weights", f"{weight['bits']} bits, {grid}; {zero[weight['zero_point']]}"),
        ("Solver", solver[weight["solver"]]),
        *([("Inputs", predicted)] if looks_at_inputs(recipe) else []),
        ("Activations", "; ".join(grids) + ", quantized while the model runs"),
        ("Rotation", turned.get(str(rotation), f"Hadamard, blocks of {rotation}")),
        *([("Modulation", modulation)] if has_modulation else []),
    ]


def size_text(shapes: Mapping[str, Any]) -> str:
    """Return the latent sizes of the graphs in words, ranges with what they are tuned for.

    Args:
        shapes: The sizes that the manifest records.
    """
    parts = []
    for axis in ("frames", "height", "width"):
        low, best, high = (shapes.get(axis) or [0, 0, 0])[:3]
        parts.append(f"{best} {axis}" if low == high else f"{low} to {high} {axis} (tuned for {best})")
    return f"{' × '.join(parts)}; {shapes.get('text_tokens', '?')} text tokens; batch {shapes.get('batch', 1)}"


# --------------------------------------------------------------------------------------------------------- kept layers


def kept_groups(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the layers in 16 bit by the glob that keeps them: ``why``, ``glob``, ``names``, ``count``.

    Args:
        manifest: The manifest of the export.
    """
    from dvdquant.model.families import FAMILIES

    family = next((f for f in FAMILIES if f.name == manifest.family), None)
    rules = [(str(glob), "asked for with --keep") for glob in manifest.recipe["keep"]]
    if family is not None:
        rules += [
            (glob, f"the {family.name} family keeps input, output and conditioning layers") for glob in family.keep
        ]
        rules += [(glob, "modulation, kept by the recipe") for glob in family.modulation]
    groups: dict[str, dict[str, Any]] = {}
    for name in manifest.kept:
        glob, why = next(
            (rule for rule in rules if fnmatchcase(name, rule[0])), ("", "no rule of this version names it")
        )
        groups.setdefault(glob, {"glob": glob, "why": why, "names": []})["names"].append(name)
    return [{**group, "count": len(group["names"])} for group in groups.values()]


# ------------------------------------------------------------------------------------------------------- what executes


class Execution(dict[str, Any]):
    """One row of the table: ``where``, ``graph``, ``path``, ``words``, ``slow`` (A4 no faster than A8 there)."""


def executions(manifest: Manifest) -> tuple[list[Execution], list[str]]:
    """Return the rows for engines and then for graphs, and the SMs on which 4-bit activations bring no speed.

    Args:
        manifest: The manifest of the export.
    """
    rows, slow = [], []
    for engine in manifest.engines:
        flat = _is_flat(engine)
        slow += [sm for sm in engine["sm"] if flat and sm not in slow]
        rows.append(
            Execution(
                where=f"SM {', '.join(engine['sm'])}",
                graph=f"a{engine['act_bits']}",
                by=_builder(engine),
                path=engine["path"],
                words=engine["executes"],
                slow=flat,
            )
        )
    words = {
        "tensorrt": "QuantLinear nodes: TensorRT with the plugin, or ONNX Runtime by their function bodies",
        "onnx": "standard QuantizeLinear and DequantizeLinear, for any runtime",
    }
    for graph in manifest.graphs:
        rows.append(
            Execution(
                where="any",
                graph=f"a{graph['act_bits']}",
                by="ONNX",
                path=graph["path"],
                words=words.get(graph["target"], graph["target"]),
                slow=False,
            )
        )
    return rows, slow


def _is_flat(engine: EngineEntry) -> bool:
    """Return whether an engine of 4-bit activations multiplies as one of 8 bits does on all of its SMs."""
    if engine["act_bits"] != 4 or engine["precision"] not in ("int8", "plugin"):
        return False
    known = [CAPABILITIES[sm] for sm in engine["sm"] if sm in CAPABILITIES]
    return engine["precision"] == "int8" or (bool(known) and not any(each.kernels_a4 for each in known))


def _builder(engine: EngineEntry) -> str:
    names = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
    versions = ", ".join(engine["versions"].values())
    lean = ", or its lean runtime" if engine.get("version_compatible") else ""
    return f"{names.get(engine['backend'], engine['backend'])} {versions}".strip() + lean


# ------------------------------------------------------------------------------------------------------------ commands


def commands(
    manifest: Manifest, out: Path | str, prompt: str, schedule: bool, images: ImageInputs = NO_IMAGES
) -> list[tuple[str, str]]:
    """Return (what it does, shell line) for this export.

    Args:
        manifest: The manifest of the export.
        out: The folder of the export.
        prompt: The prompt of the examples.
        schedule: True if the export has a schedule beside it.
        images: What its model draws from.
    """
    folder, words = shell_word(str(out)), shell_word(prompt)
    words += " --image first.png" if images.first == "required" else ""
    words += " --last-image last.png" if images.last == "required" else ""
    bits = sorted({g["act_bits"] for g in manifest.graphs})
    if len(bits) < 2:
        mode = f"a{bits[0]}" if bits else "16"
        return [
            ("A clip", f"dvdq-run {folder} --prompt {words} --mode {mode} -o clip.mp4"),
            ("Check every file against the manifest", f"dvdq-inspect {folder} --check"),
        ]
    lines = [
        (
            "A clip, 4 or 8 bits chosen at every step",
            f"dvdq-run {folder} --prompt {words} -o clip.mp4 --trace clip.json",
        ),
        ("16 bit, a8, switching and a4 side by side", f"dvdq-run {folder} --prompt {words} -o compare.mp4 --compare"),
    ]
    path = shell_word(str(Path(out) / "schedule.json"))
    if schedule:
        lines.append(("Follow its schedule", f"dvdq-run {folder} --prompt {words} -o clip.mp4 --schedule {path}"))
    else:
        lines.append(("Plan the bits of every step", f"dvdq-plan {folder} --prompt {words} --average-bits 6 -o {path}"))
    return [*lines, ("Check every file against the manifest", f"dvdq-inspect {folder} --check")]


def _sampling_arguments(manifest: Manifest) -> list[str]:
    """Arguments of a pipeline's call for the recorded defaults, which a pipeline does not know."""
    sampling = manifest.sampling or {}
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    return [f"{names[name]}={value!r}" for name, value in sampling.items()]


def python_lines(manifest: Manifest, out: Path | str, prompt: str, table: bool, images: ImageInputs = NO_IMAGES) -> str:
    """Return a script that makes a clip with this export. ``table``: its source has a prompt table instead of a pipeline.

    Args:
        manifest: The manifest of the export.
        out: The folder of the export.
        prompt: The prompt of the example.
        table: True if the source has a prompt table instead of a pipeline.
        images: What its model draws from.
    """
    folder, model = str(out), manifest.source["model"]
    if names_file(model):  # text encoder, VAE and scheduler come from elsewhere
        model = "FOLDER OF ITS DIFFUSERS PIPELINE"
    bits = sorted({g["act_bits"] for g in manifest.graphs})
    mode = "switch" if len(bits) > 1 else f"a{bits[0]}" if bits else "16"
    if table:
        return "\n".join(
            [
                "from pathlib import Path",
                "",
                "from dvdquant.deploy.artifact import Artifact",
                "from dvdquant.deploy.generation.generate import GenerateRequest, generate",
                "from dvdquant.deploy.generation.video import enlarge, write_mp4",
                "",
                f"artifact = Artifact.open({folder!r})",
                f"result = generate(artifact, GenerateRequest({prompt!r}, mode={mode!r}))",
                'write_mp4(Path("clip.mp4"), enlarge(result.frames), fps=8)',
            ]
        )
    from dvdquant.deploy.pipelines.parts import PIPELINES

    # A model that needs an image has one of its own.
    fitting = [name for name, kind in PIPELINES.items() if kind.family == manifest.family]
    wanted = [name for name in fitting if (PIPELINES[name].image == "required") == (images.first == "required")]
    pipeline = next(iter(wanted), "DiffusionPipeline")
    given_images = []
    if images.first == "required":
        given_images.append('image=load_image("first.png")')
    if images.last == "required":
        given_images.append('last_image=load_image("last.png")')
    load = [
        f"{name} = DvdqTransformer.from_pretrained({folder!r}, component={name!r}, mode={mode!r})"
        for name in manifest.components
    ]
    given = ", ".join(f"{name}={name}" for name in manifest.components)
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {pipeline}",
            *(["from diffusers.utils import load_image"] if given_images else []),
            "",
            "from dvdquant.deploy import DvdqTransformer",
            "",
            *load,
            f"pipe = {pipeline}.from_pretrained({model!r}, {given}, torch_dtype=torch.bfloat16)",
            f"frames = pipe({', '.join([*given_images, f'prompt={prompt!r}', *_sampling_arguments(manifest)])}).frames[0]",
        ]
    )
