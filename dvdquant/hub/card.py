"""The card of an export's repository: what the hub reads at its top, how to use it, and the export's own card."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.provenance import model_name
from dvdquant.errors import OutputError
from dvdquant.text import markdown_code as code

__all__ = ["CARD", "hub_card"]

CARD = "README.md"
TAGS = ("dvdquant", "video", "diffusion", "quantization", "tensorrt", "onnx", "4-bit")
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:/+-]{0,99}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


def hub_card(
    manifest: Manifest,
    body: str,
    repo: str,
    *,
    tags: Sequence[str] = (),
    license: str | None = None,
    base_model: str | None = None,
) -> str:
    """Return the card of a repository.

    Args:
        manifest: The manifest as the repository has it. Its names are untrusted.
        body: The export's own card.
        repo: The name of the repository.
        tags: More tags.
        license: The license by the hub's name for it, or None.
        base_model: The repository of the model that was exported, or None.

    Raises:
        OutputError: A tag or the license is out of form.
    """
    for tag in tags:
        if not _TAG.fullmatch(tag):
            raise OutputError(f"{tag!r:.120} is no tag", available="letters, digits, spaces and . _ : / + -")
    if license is not None and not _LICENSE.fullmatch(license):
        raise OutputError(
            f"{license!r:.120} is no name of a license", available="the hub's names, such as apache-2.0 or other"
        )
    model = manifest.source["model"]
    widths = [f"w4a{bits}" for bits in sorted({graph["act_bits"] for graph in manifest.graphs})]
    # JSON's texts and lists are YAML's as well, so nothing in a name can end a field.
    fields: dict[str, object] = {
        "library_name": "dvdquant",
        "pipeline_tag": "text-to-video",
        "tags": list(dict.fromkeys([*TAGS, manifest.family, *widths, *tags])),
    }
    if base_model is not None:
        fields |= {"base_model": base_model, "base_model_relation": "quantized"}
    if license is not None:
        fields["license"] = license
    front = "".join(f"{name}: {json.dumps(value, ensure_ascii=True)}\n" for name, value in fields.items())
    text = _FRONT.sub("", body).strip() or f"# {code(model_name(model))} in 4 bits"
    use = [
        "## Use it",
        "",
        "```python",
        "import dvdquant",
        "",
        f'transformer = dvdquant.DvdqTransformer.from_pretrained("{repo}")',
        "```",
        "",
        "```console",
        f'$ dvdq-run {repo} --prompt "..." -o clip.mp4',
        "```",
    ]
    return f"---\n{front}---\n\n{text}\n\n" + "\n".join(use) + "\n"
