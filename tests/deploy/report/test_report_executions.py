"""The report says of an engine that 4-bit activations bring no speed exactly where the exporter's words say so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dvdquant.deploy.report.text import executions
from dvdquant.export.engines.precision import RTX_SMS, TENSORRT_SMS, choose_precision, what_executes
from dvdquant.recipe import RECIPES


@pytest.mark.parametrize(("backend", "sms"), [("tensorrt_rtx", RTX_SMS), ("tensorrt", TENSORRT_SMS)])
def test_engines_that_4_bits_do_not_speed_up(backend: str, sms: tuple[str, ...]) -> None:
    seen = set()
    for sm in sms:
        for activation in RECIPES["w4a4"].activations:
            precision = choose_precision(backend, sm, activation)
            words = what_executes(precision, activation.bits, sm)
            engine = {
                "path": "x", "backend": backend, "sm": [sm], "act_bits": activation.bits, "precision": precision,
                "executes": words, "versions": {},
            }  # fmt: skip
            manifest: Any = SimpleNamespace(engines=[engine], graphs=[])
            (row,), slow = executions(manifest)
            said = "no faster than a8" in words.lower()
            assert (row["slow"], slow) == (said, [sm] * said), (sm, activation.bits)
            seen.add(said)
    assert seen == {True, False}
