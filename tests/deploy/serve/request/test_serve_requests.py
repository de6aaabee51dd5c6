"""What a request may say: every field from JSON and from a form, in words where it is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvdquant.artifact.manifest import load_manifest
from dvdquant.deploy.serve.request.requests import frames_of_seconds, generate_request, read_request
from dvdquant.deploy.serve.request.wording import client_text
from dvdquant.deploy.serve.settings import ModelSource
from dvdquant.errors import DvdquantError
from tests.support.exporting import REPOSITORY
from tests.support.running import short_wan_export

FULL: dict[str, Any] = {
    "prompt": "a cat",
    "model": "wan",
    "negative_prompt": "dogs",
    "num_inference_steps": 20,
    "guidance_scale": 5.5,
    "seed": 2**63 - 1,
    "num_frames": 81,
    "fps": 16.0,
    "width": 832,
    "height": 480,
    "mode": "switch",
    "delta": 0.1,
    "last_high": 1,
    "weighting": "none",
    "cache": 0.05,
    "cache_policy": "easycache",
}


def test_json_and_form_mean_the_same() -> None:
    assert read_request(FULL, form=False) == FULL
    as_text = {name: str(value) for name, value in FULL.items()}
    assert read_request(as_text, form=True) == FULL


def test_size_is_width_and_height_and_null_is_missing() -> None:
    assert read_request({"prompt": "x", "size": "832x480", "seed": None}, form=False) == {
        "prompt": "x",
        "width": 832,
        "height": 480,
    }
    assert read_request({"prompt": "x", "seconds": "", "size": "2x4"}, form=True) == {
        "prompt": "x",
        "width": 2,
        "height": 4,
    }
    same = read_request({"prompt": "x", "size": "832x480", "width": 832}, form=False)
    assert same["height"] == 480


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "prompt is missing"),
        ({"prompt": ""}, "prompt is ''"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": ["x"]}, "prompt is"),
        ({"prompt": "x\ud800"}, "surrogate"),
        ({"prompt": "x", "steps": 5}, "'steps' is unknown"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"prompt": "x", "num_inference_steps": True}, "num_inference_steps is True"),
        ({"prompt": "x", "num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"prompt": "x", "num_inference_steps": "5"}, "num_inference_steps is '5'"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x", "seed": 2**63}, "seed is"),
        ({"prompt": "x", "seed": 10**400}, "seed is"),
        ({"prompt": "x", "guidance_scale": 1e300}, "guidance_scale is"),
        ({"prompt": "x", "size": "big"}, "size is 'big'"),
        ({"prompt": "x", "size": "0x480"}, "size is 0x480"),
        ({"prompt": "x", "size": "99999x480"}, "size is 99999x480"),
        ({"prompt": "x", "size": "832x480", "width": 4}, "size is 832x480 and width is 4"),
        ({"prompt": "x", "seconds": "4", "num_frames": 9}, "num_frames and seconds"),
        ({"prompt": "x", "mode": "16"}, "mode is '16'"),
        ({"prompt": "x", "schedule": "s", "delta": 0.1}, "delta does not apply"),
        ({"prompt": "x", "schedule": "s", "mode": "a4"}, "mode does not apply"),
        ({"prompt": "x", "average_bits": 6, "delta": 0.1}, "delta does not apply"),
        ({"prompt": "x", "average_bits": 6, "mode": "a8"}, "mode does not"),
    ],
)
def test_what_is_refused_says_why(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DvdquantError) as caught:
        read_request(fields, form=False)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 2000


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from([*FULL, "size", "seconds", "schedule", "average_bits", "other"]), _JSON),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_any_fields_are_read_or_refused(fields: dict[str, Any], form: bool) -> None:
    if form:
        fields = {name: str(value) for name, value in fields.items()}
    try:
        values = read_request(fields, form=form)
    except DvdquantError:
        return
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    values["prompt"].encode("utf-8")


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"),
    [("5", 16, 81), (5.0, 16, 81), ("1.9", 16, 29), ("0.1", 16, 5), ("2", 8, 17), ("10.3", 16, 161)],
)
def test_seconds_become_the_nearest_frames(seconds: str | float, fps: float, frames: int) -> None:
    assert frames_of_seconds(seconds, fps, {"min": 5, "max": 161, "step": 4}) == frames


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "nan", "inf", "1e9", "20", 1e300])
def test_other_seconds_are_refused_with_what_there_is(seconds: str | float) -> None:
    with pytest.raises(DvdquantError, match="seconds is") as caught:
        frames_of_seconds(seconds, 16, {"min": 5, "max": 161, "step": 4})
    assert caught.value.available == "0.3125 to 10.0625 s at 16 frames per second"


def test_errors_name_no_path_and_no_option() -> None:
    said = client_text("cannot read /srv/models/wan/config.json: --steps is 0, see '/home/joe/x.py' and a/b")
    assert said == "cannot read config.json: num_inference_steps is 0, see 'x.py' and a/b"
    assert client_text("\x1b[31m" + "x" * 5000).startswith("\\x1b[31mxx")
    assert len(client_text("x" * 5000)) == 1500


def test_the_server_process_needs_no_torch(tmp_path: Path) -> None:
    """It checks and queues; only workers load frameworks."""
    code = "import sys, dvdquant.deploy.serve.server; print({'torch', 'numpy', 'diffusers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_an_export_of_one_width_has_nothing_to_switch_between() -> None:
    """A request that says nothing of widths is drawn at the only one; one that asks to switch is not taken for another."""
    manifest = load_manifest(short_wan_export())
    one = SimpleNamespace(graphs=[graph for graph in manifest.graphs if graph["act_bits"] == 8])
    source = ModelSource("wan", "out")
    for known, mode in ((manifest, "switch"), (one, "a8")):
        assert generate_request({"prompt": "a"}, known, source).mode == mode
        assert generate_request({"prompt": "a", "delta": 0.1}, known, source).mode == "switch"
