"""A page read back: its elements, attributes, texts, and whether tags are balanced; and manifests for it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from dvdquant.artifact.manifest import Manifest
from dvdquant.deploy.report.page import Report
from dvdquant.deploy.report.samples import Sample, SampleRow
from dvdquant.deploy.report.text import shown
from dvdquant.deploy.switching.schedule import Schedule
from tests.support.commands import in_process
from tests.support.folders import shared_folder
from tests.support.running import short_wan

STEPS = 3
PIXEL = "data:image/png;base64,iVBORw0KGgo="

# Elements that HTML ends by itself. SVG ones without content are written with a slash.
VOID = {"meta", "img", "br", "link", "input", "hr"}


@functools.cache
def report_source() -> Path:
    """The toy model, made for a few steps instead of fifty."""
    return report_export().parent / "tiny-wan"


@functools.cache
def report_export() -> Path:
    """An export with everything a page can show, verified and with a sample; made once a run."""

    def make(folder: Path) -> None:
        source = folder / "tiny-wan"
        shutil.copytree(short_wan(), source)
        table = json.loads((source / "prompts.json").read_text())
        (source / "prompts.json").write_text(json.dumps({**table, "steps": STEPS}))
        options = ("--target", "graphs", "--recipe", "w4a4", "--latent", "8x24x24", "--text-tokens", 5)
        in_process(source, "-o", folder / "out", *options, "--verify", "--report")

    return shared_folder("report", make) / "out"


class Page(HTMLParser):
    """What a browser would make of ``text``, as far as the tests ask."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.pairs: set[tuple[str, str]] = set()  # (element, attribute), and (element, "")
        self.values: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.faults: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{name}> is not closed" for name in self._open]

    @property
    def text(self) -> str:
        """All text, white space as one space."""
        return " ".join(" ".join(self.texts).split())

    def of(self, element: str, attribute: str) -> list[str]:
        """Values of an attribute in document order."""
        return [value for name, key, value in self.values if (name, key) == (element, attribute)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> at line {self.getpos()[0]} closes nothing that is open")

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.faults.append(f"a comment: {data[:80]}")

    def handle_pi(self, data: str) -> None:
        self.faults.append(f"a processing instruction: {data[:80]}")

    def unknown_decl(self, data: str) -> None:
        self.faults.append(f"a declaration: {data[:80]}")

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pairs |= {(tag, ""), *((tag, name) for name, _ in attrs)}
        self.values += [(tag, name, value or "") for name, value in attrs]
        if len({name for name, _ in attrs}) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")


def with_text(manifest: Manifest, text: str) -> Manifest:
    """``manifest`` with ``text`` in every field that holds a free one, and engines for two SMs."""
    # A path holds no colon, so no URL: what would be hidden in one is hidden before.
    path = re.sub(r"[\x00-\x1f\x7f\\:/]", "", shown(text))[:60].strip(".") or "x"
    name = f"engines/{path}.engine"
    layers = [
        {**entry, "name": f"blocks.{i}.{text}", "members": [text, f"{text}{i}"]}
        for i, entry in enumerate(manifest.layers[:6])
    ]
    layers += [{**manifest.layers[0], "name": text}]
    engine: dict[str, Any] = {
        "path": name,
        "backend": text,
        "sm": ["8.9", text],
        "act_bits": 4,
        "precision": text,
        "executes": text,
        "onnx_sha256": "0" * 64,
        "versions": {text: text},
        "shapes": {text: text},
    }
    # Not by way of JSON: a manifest that is read takes no free text as an SM or a dtype, and the page trusts none of them.
    return dataclasses.replace(
        manifest,
        source={**manifest.source, "model": text, "class_name": text, "fingerprint": text},
        family=text,
        recipe={**manifest.recipe, "name": text, "keep": [text]},
        shapes={**manifest.shapes, "dtype": text, "text_tokens": text},
        layers=tuple(layers),  # type: ignore[arg-type]
        kept=(text, f"{text}.more"),
        nonfinite=(text,),
        # The second is one that the page warns of, with all of its SMs.
        engines=(engine, {**engine, "precision": "int8"}),  # type: ignore[arg-type]
        components=(text,),
        files={**manifest.files, name: {"sha256": "0" * 64, "bytes": 7}},
        tools={text: text},
        dvdquant_version=text,
    )


def planned(manifest: Manifest, *bits: int | None) -> Schedule:
    """A schedule for ``manifest``."""
    fields = {"fingerprint": manifest.source["fingerprint"], "recipe": manifest.recipe["name"], "average_bits": 5.5}
    return Schedule(**fields, steps=len(bits), delta=0.1375, bits=bits, prompts=("one", "two"))


def full_report(manifest: Manifest, text: str) -> Report:
    """Everything a page can show, with ``text`` wherever a text can come from outside."""
    changed = with_text(manifest, text)
    row = SampleRow("switch", text, PIXEL, 8, 8, (8, 4, None))
    errors = {"a4": [0.5, 0.25], "a8": [0.1, math.nan]}
    executed = {"backend": text, "device": text, "resident_bytes": {"weights": 1, "engines": 2, "workspace": 3}}
    sample = Sample(text, 0, 3, (row,), errors, executed)
    return Report(changed, text, 5, (4, 3), (), planned(manifest, 8, 4, None), (sample,), (text,))
