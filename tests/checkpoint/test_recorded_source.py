"""What is told from the source in a manifest: by its fields, and of older manifests by their words."""

from __future__ import annotations

from typing import Any

import pytest

from dvdquant.checkpoint.recorded_source import had_few_bits, was_diffusers_folder

GGUF = {"format": "GGUF file with the names of diffusers", "precision": "Q4_K, F32"}
FOLDER = {"format": "diffusers folder, prefix model.", "precision": "bf16"}


@pytest.mark.parametrize(
    ("source", "folder", "few"),
    [
        ({}, True, False),
        (FOLDER, True, False),
        (GGUF, False, True),
        # The fields are right, whatever the words say.
        ({**GGUF, "diffusers_folder": True, "few_bits": []}, True, False),
        ({**FOLDER, "diffusers_folder": False, "few_bits": ["Q5_0"]}, False, True),
    ],
)
def test_where_the_weights_came_from(source: Any, folder: bool, few: bool) -> None:
    assert (was_diffusers_folder(source), had_few_bits(source)) == (folder, few)
