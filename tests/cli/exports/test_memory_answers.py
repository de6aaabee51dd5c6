"""The dry run of an export says whether the whole pipeline fits the device, and how."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.commands import in_process
from tests.support.exporting import TINY_WAN
from tests.support.running import wan_pipeline


def test_a_named_card(tmp_path: Path) -> None:
    """The toy model has neither text encoder nor VAE, so nothing of a family's is counted."""
    text = in_process(TINY_WAN, "-o", tmp_path / "out", "--gpu", "RTX 4060", "--dry-run")
    assert "does the whole pipeline fit" in text
    assert "RTX 4060 8 GB: fits (" in text
    assert "UMT5" not in text


def test_devices_of_a_compute_capability(tmp_path: Path) -> None:
    """A tiny Wan beside UMT5-XXL: 10.6 GiB in 16 bit do not fit an Orin of 8 GB, and 4.4 in 4 bits do."""
    _, pipeline = wan_pipeline()
    arguments = (pipeline, "-o", tmp_path / "out", "--target", "tensorrt", "--sm", "8.7", "--dry-run")
    arguments += ("--height", 48, "--width", 64, "--num-frames", 9)
    (line,) = (line for line in in_process(*arguments, "--log-format", "json").splitlines() if '"devices"' in line)
    devices = json.loads(line)["devices"]
    assert [name for name in devices if name != "counted"] == ["Orin 8 GB", "Orin 16 GB", "Orin 32 GB", "Orin 64 GB"]
    assert devices["Orin 8 GB"].startswith("fits: ")
    assert "text encoder in 4 bits" in devices["Orin 8 GB"]
    assert "bits" not in devices["Orin 64 GB"]
    assert devices["Orin 64 GB"].startswith("fits")
    assert "UMT5-XXL" in devices["counted"]
    assert not list(tmp_path.iterdir())
