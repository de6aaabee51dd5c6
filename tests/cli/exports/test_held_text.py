"""What the commands say of the memory for weights: ``dvdq-inspect --weights``, the dry run, and ``--weights`` of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dvdquant.cli.exports.held_text import choice_text
from dvdquant.cli.inspect import main as inspect_main
from dvdquant.deploy.artifact import Artifact
from dvdquant.hardware.capabilities import CAPABILITIES, sm_number
from dvdquant.model.held_weights import held_weights, largest_kept
from dvdquant.model.weight_choice import choose_weights
from dvdquant.text import amount
from tests.support.commands import in_process, refused
from tests.support.device_build import made as made
from tests.support.device_build import model as model
from tests.support.running import PROMPT, drawn, run, short_wan_export
from tests.support.session_exports import RANGES


def inspect(*arguments: object) -> str:
    result = CliRunner().invoke(inspect_main, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_both_forms_are_told_for_every_gpu() -> None:
    out = short_wan_export()
    artifact = Artifact.open(out)
    plan, bits = artifact.plan(), artifact.bits()
    text, data = inspect(out, "--weights"), json.loads(inspect(out, "--weights", "--json"))
    known = [sm for sm, facts in CAPABILITIES.items() if facts.kernels and not facts.refused]
    assert list(data["transformer"]) == sorted(known, key=list(data["transformer"]).index)
    assert set(data["transformer"]) == set(known)
    for sm in ("8.9", "9.0"):
        held = held_weights(plan, int(sm.replace(".", "")), bits, artifact.sizes)
        told = data["transformer"][sm]
        assert (told["packed"], told["expanded"]) == (held.nbytes("packed"), held.nbytes("expanded"))
        choice = choose_weights(held, "auto")
        assert (told["auto"], told["auto_bytes"]) == (choice.form, choice.nbytes)
        assert choice_text(choice) in text
        assert amount(held.nbytes("packed")) in text
        assert amount(held.nbytes("expanded", plugin=True)) in text
    assert data["transformer"]["8.9"]["expanded"] > data["transformer"]["9.0"]["expanded"]
    largest = largest_kept(plan, 1)[0]
    assert f"{largest.name} " in text
    assert "[modelled, not measured]" in text
    # The dry run of a clip says the same.
    assert text.strip() in drawn(out, "--prompt", PROMPT, "--dry-run", "--steps", 2)


def test_options_that_do_not_go_together() -> None:
    out = short_wan_export()
    for other in (("--layers",), ("--graph", "onnx/transformer_a4.onnx"), ("--html", "page.html")):
        result = CliRunner().invoke(inspect_main, [str(out), "--weights", *other])
        refused(result, "--weights is a view of its own", other[0])
    for other in ("--layers", "--json", "--weights"):
        result = CliRunner().invoke(inspect_main, [str(out), "--trace", "t.json", other])
        refused(result, f"--trace shows a run, so {other} does not apply")
    refused(run(out, "--prompt", "x", "--weights", "thin", "-o", "clip.mp4"), "thin")
    refused(
        run(out, "--prompt", PROMPT, "--weights", "expanded", "--backend", "pytorch", "--device", "cpu",
            "--steps", 2, "-o", "clip.mp4"),
        "PyTorch on cpu keeps weights packed",
    )  # fmt: skip


@pytest.mark.parametrize("sm", ["8.0", "8.7", "8.9", "11.0", "12.0"])
def test_the_dry_run_of_an_export_says_what_engines_with_the_plugin_hold(
    sm: str, made: Path, model: Path, tmp_path: Path
) -> None:
    """What ``dvdq-inspect --weights`` says of the plugin afterwards, and not of a PyTorch session, which holds less."""
    words = (model, "-o", tmp_path / "out", "--recipe", "rtn", "--target", "tensorrt", "--sm", sm, *RANGES, "--dry-run")
    said = " ".join(in_process(*words).split())
    held = json.loads(inspect(made, "--weights", "--json"))["transformer"][sm]
    assert held["plugin_packed"] > held["packed"]
    packed, expanded = (amount(held[f"plugin_{form}"]) for form in ("packed", "expanded"))
    assert f"weights {packed} packed, for all bit-widths together; {expanded} expanded" in said
    artifact = Artifact.open(made)
    counted = held_weights(artifact.plan(), sm_number(sm), artifact.bits("transformer"), artifact.sizes)
    choice = choose_weights(counted, "auto", plugin=True)
    assert (f"auto: {amount(choice.nbytes)} on SM {sm}" if choice.expanded else "auto: packed, which") in said
    assert not list(tmp_path.iterdir())
