"""Charts of the report, and names, paths and prompts in it that come from strangers: none becomes markup, no secret shows."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

from dvdquant.artifact.manifest import Manifest, load_manifest
from dvdquant.deploy.report.charts import error_chart, line_chart, schedule_chart
from dvdquant.deploy.report.page import render_report
from dvdquant.deploy.report.text import shown
from tests.support.report_pages import PIXEL, Page, full_report, report_export
from tests.support.secret_texts import SECRETS

# ------------------------------------------------------------------------------------------------------ untrusted text

HOSTILE = (
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>', "'><img src=x onerror=alert(1)>", "<svg onload=alert(1)>", "<svg/onload=alert(1)//",
    '" onmouseover="alert(1)', "' onmouseover='alert(1)", "` onmouseover=`alert(1)", '" style="background:url(//e.example/x)',
    "</title><script>alert(1)</script>", "</style><script>alert(1)</script>", "</text></svg><script>alert(1)</script>",
    "</code></pre><iframe src=javascript:alert(1)>", "<a href=javascript:alert(1)>x</a>", "javascript:alert(1)",
    "<iframe srcdoc='<script>alert(1)</script>'>", "<object data=x>", "<embed src=x>", "<base href=//e.example/>",
    "<link rel=stylesheet href=//e.example/x.css>", "<meta http-equiv=refresh content=0;url=//e.example/>",
    "<form action=//e.example/><button>x</button></form>", "<details open ontoggle=alert(1)>", "<body onload=alert(1)>",
    "<input autofocus onfocus=alert(1)>", "<video><source onerror=alert(1)>", "<math><mtext></form><form><mglyph><style></math>",
    "<!--", "--><script>alert(1)</script>", "<![CDATA[<script>alert(1)</script>]]>", "<?xml version='1.0'?>", "<!DOCTYPE x>",
    "{{ 7 * 7 }}", "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}", "{{ m.__class__ }}", "{# x #}",
    "&lt;script&gt;alert(1)&lt;/script&gt;", "&#60;script&#62;alert(1)&#60;/script&#62;", "&quot; onload=alert(1) x=&quot;",
    "\u202egnp.exe", "a\u0000b", "\ufeff<script>alert(1)</script>", "<scr\u200bipt>alert(1)</scr\u200bipt>", "\x1b[31mred",
    "＜script＞alert(1)＜/script＞", "<SCRIPT SRC=//e.example/x.js></SCRIPT>", "<foreignObject><body onload=alert(1)>",
    "<use href=data:image/svg+xml;base64,PHN2Zz4=>", "<animate attributeName=href values=javascript:alert(1)>",
    "$(touch x)`y`; rm",
    "%s%n{0}{name!r}", "<" * 700, '"' * 700,
)  # fmt: skip


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return load_manifest(report_export())


@pytest.fixture(scope="module")
def clean(manifest: Manifest) -> Page:
    found = Page(render_report(full_report(manifest, "plain")))
    assert found.faults == []
    return found


def test_there_are_fifty_hostile_texts() -> None:
    assert len(set(HOSTILE)) >= 50


@pytest.mark.parametrize("text", HOSTILE, ids=[f"{i:02}" for i in range(len(HOSTILE))])
def test_no_text_becomes_markup(text: str, manifest: Manifest, clean: Page) -> None:
    report = full_report(manifest, text)
    if HOSTILE.index(text) % 5 == 0:  # other branches of the page, the same text in them
        bare = Page(render_report(dataclasses.replace(report, samples=(), schedule=None)))
        assert bare.faults == []
        assert bare.pairs <= clean.pairs
    page = Page(render_report(report))
    assert page.faults == []
    assert page.pairs <= clean.pairs
    assert set(page.of("img", "src")) == {PIXEL}
    trusted = [(tag, name) for tag, name in clean.pairs if name in ("class", "style", "src", "content", "http-equiv")]
    for tag, name in trusted:
        assert set(map(_kind, page.of(tag, name))) <= set(map(_kind, clean.of(tag, name)))
    seen = " ".join(shown(text).split())
    assert page.text.count(seen) >= 15  # it is there, as text
    assert not re.search("[\u202a-\u202e\u200b\ufeff\x00\x1b]", page.source)


def _kind(value: str) -> str:
    """A width is a number of its own in every page."""
    return re.sub(r"width: [\d.]+%", "width", value)


@pytest.mark.parametrize(("text", "secret"), SECRETS, ids=[str(i) for i in range(len(SECRETS))])
def test_no_secret_is_shown(text: str, secret: str, manifest: Manifest) -> None:
    assert secret not in render_report(full_report(manifest, text))


def test_plain_names_stay_as_they_are() -> None:
    for text in (
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "blocks.0.attn1.to_q+to_k+to_v",
        "./a b/c@d",
        "transformer_blocks.3.norm1_key",
    ):
        assert shown(text) == text


# ------------------------------------------------------------------------------------------------------------- charts


def test_heights_of_marks_are_the_values(manifest: Manifest) -> None:
    chart = Page(error_chart(manifest.layers))
    assert chart.faults == []
    rings = [float(y) for y, kind in zip(chart.of("circle", "cy"), chart.of("circle", "class")) if kind == "dot ours"]
    values = np.array([e["relative_mse"] for e in manifest.layers])
    if "logarithmic" in error_chart(manifest.layers):
        values = np.log10(values)
    heights = np.array(rings[1:])  # the first is the legend's
    slope, offset = np.polyfit(values, heights, 1)
    assert slope < 0
    assert np.allclose(slope * values + offset, heights, atol=0.01)


def test_charts_of_extremes() -> None:
    lines = {"a4": [1e-6, 1.0, math.inf, math.nan], "a8": [0.0] * 4}
    for text in (
        line_chart(lines, "x", "y"),
        line_chart({"a8": [0.0]}, "x", "y"),
        schedule_chart([8, None, 4, 6] * 250),
    ):
        assert Page(text).faults == []
        assert not re.search(r'="[^"]*(nan|inf)', text)
    assert error_chart([]) == ""
    entry = {"name": "x", "members": [], "features_in": 1, "features_out": 1, "rotation_block": 1}
    assert error_chart([{**entry, "relative_mse": None, "relative_mse_minmax": None}]) == ""  # type: ignore[typeddict-item]
    wide = [{**entry, "relative_mse": 10.0**-i, "relative_mse_minmax": 0.0} for i in range(5)]
    assert "logarithmic" in error_chart(wide)  # type: ignore[arg-type]
