"""``dvdq-export --lora``: what is in the weights, what is said and recorded of it, and when an export is made again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dvdquant
from dvdquant.artifact.manifest import Manifest, load_manifest
from dvdquant.cli.inspect import main as inspect_main
from dvdquant.deploy.artifact import Artifact
from dvdquant.errors import DvdquantError, OutputError
from tests.support import tiny_models as tiny
from tests.support.commands import in_process, refused, run
from tests.support.lora_files import Changes, blocks, fused_folder, low_rank, write_peft

QUICK = ["--recipe", "rtn", "--target", "graphs", "--latent", "2x8x8", "--text-tokens", "4"]


@dataclasses.dataclass
class Made:
    """A Wan 2.2 pipeline, a LoRA for each of its transformers, and the export with both."""

    pipeline: Path
    loras: tuple[Path, Path]
    changes: tuple[Changes, Changes]
    out: Path
    said: str

    @property
    def options(self) -> list[object]:
        return [
            "--lora",
            f"{self.loras[0]}:0.5",
            "--lora",
            f"transformer_2={self.loras[1]}",
            "--steps",
            4,
            "--guidance",
            1,
        ]


def write_index(folder: Path) -> None:
    kind = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "transformer": kind, "transformer_2": kind}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("wan22")
    for seed, name in enumerate(("transformer", "transformer_2")):
        tiny.write_checkpoint(root / "model" / name, {**tiny.WAN, "num_layers": 1}, seed=seed)
    write_index(root / "model")
    first = root / "model" / "transformer"
    changes = tuple(low_rank(first, blocks(first), seed=seed) for seed in (3, 4))
    loras = tuple(write_peft(root / f"{name}.safetensors", c) for name, c in zip(("high", "low"), changes))
    it = Made(root / "model", (loras[0], loras[1]), (changes[0], changes[1]), root / "out", "")
    it.said = in_process(it.pipeline, "-o", it.out, *it.options, *QUICK)
    return it


def test_both_transformers_are_those_of_a_pipeline_fused_beforehand(made: Made, tmp_path: Path) -> None:
    for name, changes, scale in zip(("transformer", "transformer_2"), made.changes, (0.5, 1.0)):
        fused_folder(made.pipeline / name, tmp_path / "fused" / name, (changes, scale))
    write_index(tmp_path / "fused")
    in_process(tmp_path / "fused", "-o", tmp_path / "out", *QUICK)
    for name in ("onnx/transformer.safetensors", "onnx/transformer_2.safetensors"):
        assert (made.out / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    # An export without a LoRA says nothing of them, as before.
    plain = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert not {"lora", "sampling"} & plain.keys()


def test_what_is_recorded_and_shown(made: Made) -> None:
    manifest = load_manifest(made.out)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in made.loras]
    assert [dict(entry) for entry in manifest.lora] == [
        {"component": c, "path": str(p), "sha256": d, "scale": s, "format": "diffusers", "layers": 10}
        for c, p, d, s in zip(("transformer", "transformer_2"), made.loras, digests, (0.5, 1.0))
    ]
    assert manifest.sampling == {"steps": 4, "guidance": 1.0}
    assert Manifest.from_json(manifest.to_json()) == manifest
    card = (made.out / "README.md").read_text()
    shown = CliRunner().invoke(inspect_main, [str(made.out)]).output
    for text in (card, shown):
        assert "high.safetensors" in text
        assert "0.5" in text
        assert "4 steps, guidance 1" in text
    assert all(digest in card and digest[:16] in shown for digest in digests)
    assert "10 layers, all found" in made.said


def test_the_dry_run_lists_them(made: Made, tmp_path: Path) -> None:
    arguments = (made.pipeline, "-o", tmp_path / "out", *QUICK, "--dry-run")
    text = in_process(*arguments, *made.options)
    for path, words in zip(made.loras, ("scale 0.5", "scale 1")):
        assert f"LoRA {path}" in text
        assert words in text
    assert "rank 4" in text
    assert "diffusers names" in text
    assert "4 steps, guidance 1" in text
    alone = in_process(*arguments, "--lora", made.loras[0])
    assert "no LoRA for transformer_2: --lora transformer_2=FILE" in alone
    data = json.loads(in_process(*arguments, *made.options, "--log-format", "json"))
    assert [(one["component"], one["scale"], one["layers"]) for one in data["lora"]] == [
        ("transformer", 0.5, 10), ("transformer_2", 1.0, 10),
    ]  # fmt: skip
    assert data["sampling"] == {"steps": 4, "guidance": 1.0}
    # What a fuse holds beside the weights is in the estimate.
    plain = json.loads(in_process(*arguments, "--log-format", "json"))
    assert data["estimate"]["peak_bytes"] > plain["estimate"]["peak_bytes"]


def test_when_it_is_made_again(made: Made) -> None:
    """The same is up to date, other defaults change the manifest alone, another scale the weights."""
    before = load_manifest(made.out)
    assert "up to date" in in_process(made.pipeline, "-o", made.out, *made.options, *QUICK)
    assert load_manifest(made.out) == before
    text = in_process(made.pipeline, "-o", made.out, *made.options[:4], "--steps", 8, *QUICK)
    assert "weights and graphs in" in text
    again = load_manifest(made.out)
    assert again.sampling == {"steps": 8}
    assert again.files["onnx/transformer.safetensors"] == before.files["onnx/transformer.safetensors"]
    in_process(made.pipeline, "-o", made.out, "--lora", made.loras[0], *made.options[2:], *QUICK, "--replace")
    third = load_manifest(made.out)
    assert third.lora[0]["scale"] == 1.0
    assert third.files["onnx/transformer.safetensors"] != before.files["onnx/transformer.safetensors"]
    assert third.files["onnx/transformer_2.safetensors"] == before.files["onnx/transformer_2.safetensors"]
    command = Artifact.open(made.out).rebuild_command()
    assert f"--lora transformer_2={made.loras[1]}:1.0" in command
    assert "--steps 4 --guidance 1" in command


def test_in_python_and_verified_against_the_fused_model(made: Made, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": "rtn", "target": "graphs", "latent": "2x8x8", "text_tokens": 4}
    loras = [f"{made.loras[0]}:0.5", made.loras[1]]
    result = dvdquant.export_model(
        made.pipeline / "transformer", tmp_path / "a", lora=loras, steps=4, verify=True, **options
    )
    assert result.manifest.verified is not None
    assert [entry["scale"] for entry in result.manifest.lora] == [0.5, 1.0]
    assert result.manifest.sampling == {"steps": 4}
    with pytest.raises(DvdquantError, match="--steps is 0"):
        dvdquant.export_model(made.pipeline, tmp_path / "b", steps=0, **options)


def test_refused_before_anything_is_written(made: Made, tmp_path: Path) -> None:
    arguments = (made.pipeline, "-o", tmp_path / "out", *QUICK)
    refused(run(*arguments, "--lora", f"{made.loras[0]}:nan"), "finite")
    refused(run(*arguments, "--lora", f"transformer_3={made.loras[0]}"), "transformer_3", "transformer_2")
    refused(run(*arguments, "--lora", tmp_path / "none.safetensors"), "none.safetensors")
    refused(run(*arguments, "--lora", ""), "--lora")
    refused(run(*arguments, "--guidance", -1), "--guidance", "0 to 1000")
    refused(run(*arguments, "--steps", 1001), "--steps", "1 to 1000")
    refused(run(made.loras[0], "-o", tmp_path / "out", *QUICK), "LoRA", "--lora FILE")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora", [{"component": "transformer"}]),
        ("lora", "x"),
        ("lora[].sha256", "z" * 64),
        ("lora[].scale", 1e999),
        ("lora[].scale", "1"),
        ("lora[].layers", 0),
        ("lora[].component", "../x"),
        ("lora[].path", "a\0b"),
        ("sampling", {"steps": 0}),
        ("sampling", {"steps": True}),
        ("sampling", {"guidance": -1.0}),
        ("sampling", {"other": 1}),
    ],
)
def test_records_out_of_form(field: str, value: Any, made: Made) -> None:
    data = json.loads((made.out / "manifest.json").read_text())
    if field.startswith("lora[]."):
        data["lora"][0][field.partition(".")[2]] = value
    else:
        data[field] = value
    with pytest.raises(OutputError) as error:
        Manifest.from_json(json.dumps(data))
    assert field.partition("[")[0] in str(error.value) or "JSON" in str(error.value)
