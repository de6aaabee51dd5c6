"""The README.md of an export: its content and its making, for whoever finds the folder later."""

from __future__ import annotations

import os

from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.provenance import lora_room, model_name, sampling_sentence, source_text
from dvdquant.artifact.verified import verified_text
from dvdquant.recipe import fitted_text, looks_at_inputs
from dvdquant.text import markdown, shown
from dvdquant.text import markdown_code as code

__all__ = ["model_card"]


def model_card(manifest: Manifest) -> str:
    """Return the card of an export as Markdown.

    Names are untrusted text. They stand in code spans, or their markup is escaped.

    Args:
        manifest: The manifest of the export.
    """
    recipe = manifest.recipe
    weight = recipe["weight"]
    grid = "one scale per row" if not weight["group_size"] else f"groups of {weight['group_size']}"
    shapes = {name: shown(value) for name, value in manifest.shapes.items()}
    lines = [
        "---",
        "library_name: dvdquant",
        "tags: [video, diffusion, quantization, tensorrt, onnx]",
        "---",
        "",
        f"# {code(model_name(manifest.source['model']))} in 4 bits",
        "",
        f"{code(manifest.source['class_name'])}, quantized by dvdquant {markdown(manifest.dvdquant_version)} "
        "without calibration data.",
        "",
        *([f"- made from: {markdown(words)}"] if (words := source_text(manifest.source)) else []),
        f"- recipe {code(recipe['name'])}: 4-bit weights ({markdown(grid)}, {markdown(weight['zero_point'])} "
        f"zero-point, {markdown(weight['solver'])} solver), activations {_activations(manifest)}, "
        f"rotation {markdown(recipe['rotation'])}",
        *_inputs(manifest),
        f"- sizes (latent, min/opt/max): frames {shapes['frames']}, height {shapes['height']}, width {shapes['width']}; "
        f"{shapes['text_tokens']} text tokens; {shapes['dtype']}",
        f"- {len(manifest.layers)} quantized layers, {len(manifest.kept)} linear layers kept in 16 bit",
        *_loras(manifest),
        f"- {verified_text(manifest.verified)}",
        "",
        "| graph | for | activation bits |",
        "|---|---|---|",
        *(f"| {code(g['path'], 0)} | {markdown(g['target'])} | {g['act_bits']} |" for g in manifest.graphs),
    ]
    if manifest.engines:
        lines += ["", "| engine | SM | activation bits | what executes |", "|---|---|---|---|"]
        lines += [
            f"| {code(e['path'], 0)} | {markdown(', '.join(e['sm']))} | {e['act_bits']} | {markdown(e['executes'])} |"
            for e in manifest.engines
        ]
        lines += ["", "Engines run code when they are loaded: load only those you built or trust."]
    lines += ["", "`dvdq-inspect FOLDER` lists the layers and their errors, and checks the hashes.", ""]
    return "\n".join(lines)


def _inputs(manifest: Manifest) -> list[str]:
    """Return the line about predicted inputs as a list, which is empty if the recipe looks at weights alone."""
    if not looks_at_inputs(manifest.recipe):
        return []
    predicted = "rounded with feedback for inputs predicted by one run on synthetic latents, no data"
    return ["- " + "; ".join([predicted, *map(shown, fitted_text(manifest.recipe))])]


def _loras(manifest: Manifest) -> list[str]:
    lines = [
        f"- LoRA {code(os.path.basename(entry['path']))} fused into {code(entry['component'])} at scale {entry['scale']:g}: "
        f"{entry['layers']} layers, SHA-256 {code(entry['sha256'])}"
        for entry in manifest.lora
    ]
    lines += [f"- {words}" for words in lora_room(manifest.lora_rank)]
    if manifest.sampling is not None:
        lines.append(f"- {sampling_sentence(manifest.sampling)}")
    return lines


def _activations(manifest: Manifest) -> str:
    """Return the activation grids in words, such as "4 bits per token, 8 bits per token"."""
    grids = manifest.recipe["activations"]
    return ", ".join(
        f"{a['bits']} bits per {'token' if not a['group_size'] else str(a['group_size']) + ' channels'}" for a in grids
    )
