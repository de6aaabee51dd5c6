"""Exports of models as others store them: the same codes to the last bit, and what was recognised in log and manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.provenance import source_of
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.generate import open_generator
from dvdquant.deploy.generation.original import load_original
from dvdquant.errors import CheckpointError
from dvdquant.export import pipeline
from dvdquant.export.options import ExportOptions
from dvdquant.export.plan import plan_export
from dvdquant.model.families.configs import PIPELINE
from dvdquant.model.plan import plan_model
from dvdquant.quantize.checkpoint import quantize_checkpoint
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_reader import read_header, read_tensor
from tests.support import gguf_files as gguf
from tests.support import other_formats as formats
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process, refused, run

pytestmark = pytest.mark.usefixtures("without_graphs")

LTX_CONFIG = {"config": json.dumps({"transformer": {"num_attention_heads": 2, "attention_head_dim": 64}})}
# Quantizes without running the model: what is compared is what the quantizer reads.
RECIPE = "weights-only"
GRAPHS = ["--target", "graphs", *SIZES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {key: tiny.write_checkpoint(root / key, config) for key, config in formats.CONFIGS.items()}


def metadata(key: str) -> dict[str, str] | None:
    return LTX_CONFIG if key == "ltx" else None


def packed(model: Path, work: Path) -> dict[str, torch.Tensor]:
    """Every tensor that an export of the model stores: codes, scales, factors, and what stays in 16 bit."""
    checkpoint = open_checkpoint(model)
    plan = plan_model(checkpoint.config, get_recipe(RECIPE), torch.bfloat16, checkpoint)
    with ExportTransaction(work / "out") as transaction:
        made = quantize_checkpoint(checkpoint, plan, transaction, Progress())
        return {name: read_tensor(transaction.tree / file, info) for name, (file, info) in made.tensors.items()}


def require_same_codes(model: Path, folder: Path, work: Path) -> None:
    """The export of a model and that of the diffusers folder of its weights, bit by bit."""
    ours, theirs = packed(model, work / "a"), packed(folder, work / "b")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name].view(torch.uint8), value.view(torch.uint8)), name
    assert open_checkpoint(model).config == {**open_checkpoint(folder).config, **open_checkpoint(model).config}


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("wan", torch.bfloat16),
        # The tensors of every layout are compared by tests of the readers: the codes follow.
        *(pytest.param(key, torch.bfloat16, marks=pytest.mark.stress) for key in ("ltx", "hunyuan", "hunyuan-comfy")),
        pytest.param("wan", torch.float16, marks=pytest.mark.stress),
        ("hunyuan", torch.float8_e4m3fn),
    ],
)
def test_codes_of_single_files(tmp_path: Path, folders: dict[str, Path], key: str, dtype: torch.dtype) -> None:
    """In bf16, in fp16, and in fp8 without scales."""
    tensors = {
        name: value.to(dtype) if value.ndim == 2 and "blocks" in name else value
        for name, value in formats.folder_tensors(folders[key]).items()
    }
    folder = formats.write_folder(tmp_path / "folder", formats.CONFIGS[key], tensors)
    original = formats.ORIGINAL[key](tensors)
    file = formats.save_single(tmp_path / "m.safetensors", original, "model.diffusion_model.", metadata(key))
    require_same_codes(file, folder, tmp_path)


@pytest.mark.parametrize(
    ("key", "rows"),
    [
        ("wan", False),
        *(pytest.param(*case, marks=pytest.mark.stress) for case in (("ltx", False), ("hunyuan", False))),
        ("hunyuan", True),
    ],
)
def test_codes_of_fp8_with_scales(tmp_path: Path, folders: dict[str, Path], key: str, rows: bool) -> None:
    """Those of a folder that holds the product of weight and scale in fp32."""
    # By the authors' names, in which the linears that have one scale are joined.
    stored, meant = formats.scaled_fp8(
        formats.ORIGINAL[key](formats.folder_tensors(folders[key])), "scale_weight", rows
    )
    plain = open_checkpoint(formats.save_single(tmp_path / "plain.safetensors", meant, "", metadata(key)))
    wide = {name: plain.read(name) for name in plain.tensors}
    folder = formats.write_folder(tmp_path / "folder", formats.CONFIGS[key], wide)
    require_same_codes(formats.save_single(tmp_path / "m.safetensors", stored, "", metadata(key)), folder, tmp_path)


def test_codes_of_modelopt(tmp_path: Path, folders: dict[str, Path]) -> None:
    stored, meant = formats.scaled_fp8(formats.folder_tensors(folders["wan"]), "weight_scale")
    config = {**formats.WAN, "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    folder = formats.write_folder(tmp_path / "folder", formats.WAN, meant)
    require_same_codes(formats.write_folder(tmp_path / "m", config, stored), folder, tmp_path)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_codes_of_gguf(tmp_path: Path, kind: str) -> None:
    """Those of a folder that holds the decoded blocks in fp32."""
    config = {**formats.WAN, "num_attention_heads": 2}
    tensors = formats.folder_tensors(tiny.write_checkpoint(tmp_path / "bf16", config))
    names = dict(zip(tensors, formats.wan_original(tensors)))
    entries = gguf.stored(formats.wan_original(tensors), kind)
    decoded = gguf.meant(entries)
    folder = formats.write_folder(
        tmp_path / "folder", config, {ours: decoded[theirs] for ours, theirs in names.items()}
    )
    (tmp_path / "m.gguf").write_bytes(formats.gguf_bytes(entries, gguf.ARCHITECTURE))
    require_same_codes(tmp_path / "m.gguf", folder, tmp_path)


# ---------------------------------------------------------------------------------------------------------- the command

HIGH, LOW = "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"


@pytest.fixture(scope="module")
def comfy(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ComfyUI's with the two halves of Wan 2.2 in fp8 with scales; beside it ``pipeline``, of the same weights."""
    root = tmp_path_factory.mktemp("comfy")
    tensors = formats.folder_tensors(folders["wan"])
    index: dict[str, Any] = {"_class_name": "WanPipeline"}
    for component, name, factor in (("transformer", HIGH, 1.0), ("transformer_2", LOW, 0.5)):
        changed = {key: (value.float() * factor).to(value.dtype) for key, value in tensors.items()}
        stored, meant = formats.scaled_fp8(formats.wan_original(changed))
        formats.save_single(root / "models" / name, stored, "model.diffusion_model.")
        plain = open_checkpoint(formats.save_single(root / "plain" / "m.safetensors", meant))
        formats.write_folder(
            root / "pipeline" / component, formats.WAN, {key: plain.read(key) for key in plain.tensors}
        )
        index[component] = ["diffusers", "WanTransformer3DModel"]
    (root / "pipeline" / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="module")
def exported(comfy: Path) -> Path:
    """An export of the two files, whose graph is traced once."""
    files = [comfy / "models" / HIGH, "--transformer-2", comfy / "models" / LOW]
    with mock.patch.object(pipeline, "trace_graph", wraps=pipeline.trace_graph) as tracing:
        in_process(*files, "-o", comfy / "out", "--recipe", RECIPE, *GRAPHS)
    assert tracing.call_count == 1
    return comfy / "out"


def test_two_files_are_one_export(comfy: Path, exported: Path, tmp_path: Path) -> None:
    """What is stored is what the diffusers pipeline of the same weights gives; the manifest names both files."""
    manifest = Manifest.from_json((exported / "manifest.json").read_text())
    assert manifest.components == ("transformer", "transformer_2")
    for component in manifest.components:
        stored = read_header(exported / "onnx" / f"{component}.safetensors").tensors
        theirs = packed(comfy / "pipeline" / component, tmp_path / component)
        assert {name for name in stored if not name.startswith("__pad")} == theirs.keys()
        for name, value in theirs.items():
            ours = read_tensor(exported / "onnx" / f"{component}.safetensors", stored[name])
            assert torch.equal(ours.view(torch.uint8), value.view(torch.uint8)), name
        config = "config.json" if component == "transformer" else f"{component}.config.json"
        assert json.loads((exported / config).read_text()) == formats.WAN
    source = manifest.source
    assert "Wan's authors" in source["format"]
    assert source["precision"].startswith("fp8 (e4m3) with scales")
    assert "scales are applied in fp32" in source["notes"]
    assert (source["diffusers_folder"], source["few_bits"]) == (False, [])
    assert source_of(source, "transformer")[0].endswith(HIGH)
    assert source_of(source, "transformer_2")[0].endswith(LOW)
    assert "fp8 (e4m3) with scales" in (exported / "README.md").read_text()
    assert "--transformer-2" in Artifact.open(exported).rebuild_command()


def test_a_folder_of_two_files_is_the_same_export(comfy: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"out": tmp_path, "recipe": get_recipe(RECIPE), "targets": ("graphs",), "latent": "2x8x8"}
    files = plan_export(
        ExportOptions(str(comfy / "models" / HIGH), transformer_2=str(comfy / "models" / LOW), **common)
    )
    assert plan_export(ExportOptions(str(comfy / "models"), **common)).key == files.key


def test_an_old_manifest_is_read(exported: Path) -> None:
    """Of an export from before formats were recorded."""
    data = json.loads((exported / "manifest.json").read_text())
    for field in ("format", "precision", "notes", "transformer_2", "diffusers_folder", "few_bits"):
        del data["source"][field]
    assert Manifest.from_json(json.dumps(data)).source.keys() == {"model", "class_name", "fingerprint"}


def test_the_dry_run_lists_what_was_recognised(comfy: Path) -> None:
    text = in_process(comfy / "models", "-o", comfy / "dry", "--dry-run", *GRAPHS)
    for words in (
        HIGH,
        LOW,
        "prefix model.diffusion_model.",
        "fp8 (e4m3) with scales",
        "text to video",
        "VAE 4×8×8",
        "assumed:",
    ):
        assert words in text
    told = json.loads(in_process(comfy / "models", "-o", comfy / "dry", "--dry-run", "--log-format", "json", *GRAPHS))
    assert [source["variant"] for source in told["sources"]] == ["text to video"] * 2
    assert told["sources"][0]["vae_scale"] == [4, 8, 8]
    assert told["sources"][0]["file"] == HIGH


def test_the_model_in_16_bit_is_that_of_the_files(comfy: Path, exported: Path) -> None:
    """Beside a pipeline that has other transformers, or none: what the export was made from is what is compared with."""
    artifact = Artifact.open(exported)
    for component in ("transformer", "transformer_2"):
        model = load_original(artifact, comfy / "pipeline", component, torch.device("cpu"), torch.bfloat16)
        expected = formats.folder_tensors(comfy / "pipeline" / component)
        state = model.state_dict()
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(state[name], value.to(state[name].dtype)), name
    with torch.inference_mode():
        latents = torch.zeros(1, 16, 2, 8, 8, dtype=torch.bfloat16)
        text = torch.zeros(1, 4, 32, dtype=torch.bfloat16)
        assert model(latents, torch.zeros(1), text, return_dict=False)[0].isfinite().all()


def test_a_file_draws_nothing_alone(exported: Path) -> None:
    with pytest.raises(CheckpointError, match="single file") as caught:
        open_generator(Artifact.open(exported))
    assert "--pipeline" in str(caught.value.fix)


def test_resume(comfy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a GGUF file: an interrupted export goes on, and stores what an uninterrupted one stores."""
    import dvdquant.export.pipeline as pipeline

    tensors = formats.wan_original(formats.folder_tensors(comfy / "pipeline" / "transformer"))
    file, out = tmp_path / "wan.gguf", tmp_path / "out"
    file.write_bytes(formats.gguf_bytes(gguf.stored(tensors, "Q8_0"), gguf.ARCHITECTURE))

    def interrupted(*_given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "GraphWriter", interrupted)  # after the weights
        assert run(file, "-o", out, "--recipe", RECIPE, *GRAPHS).exit_code != 0
    assert not (out / "manifest.json").exists()
    text = in_process(file, "-o", out, "--recipe", RECIPE, *GRAPHS, "--resume")
    assert "nothing to resume" not in text
    assert "GGUF file" in text
    stored = read_header(out / "onnx" / "transformer.safetensors").tensors
    for name, value in packed(file, tmp_path / "again").items():
        ours = read_tensor(out / "onnx" / "transformer.safetensors", stored[name])
        assert torch.equal(ours.view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (lambda m: [m / LOW, "--transformer-2", m / HIGH], ("low noise", "--transformer-2")),
        (lambda m: [m, "--transformer-2", m / LOW], ("MODEL has a second transformer",)),
        (lambda m: [m / HIGH, "--transformer-2", m / "nothing.safetensors"], ("nothing.safetensors",)),
        (lambda m: [m / HIGH, "--config", m / "nothing.json"], ("nothing.json", "is missing")),
        (lambda m: [m / HIGH, "--subfolder", "x"], ("is a file",)),
    ],
)
def test_what_is_refused(
    comfy: Path, tmp_path: Path, arguments: Callable[[Path], list[Any]], named: tuple[str, ...]
) -> None:
    refused(run(*arguments(comfy / "models"), "-o", tmp_path / "out", *GRAPHS), *named)
    assert not (tmp_path / "out").exists()


def test_transformers_of_two_classes(comfy: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    other = formats.save_single(
        tmp_path / "h.safetensors", formats.hunyuan_original(formats.folder_tensors(folders["hunyuan"]))
    )
    refused(
        run(comfy / "models" / HIGH, "--transformer-2", other, "-o", tmp_path / "out", *GRAPHS), "of several classes"
    )


def test_a_given_config(folders: dict[str, Path], exported: Path, tmp_path: Path) -> None:
    """It decides what no shape tells; where its place is recorded, the command that makes the export again names it."""
    config = {**formats.LTX, "num_attention_heads": 1, "attention_head_dim": 128}
    file = formats.save_single(tmp_path / "m.safetensors", formats.ltx_original(formats.folder_tensors(folders["ltx"])))
    refused(run(file, "-o", tmp_path / "out", *GRAPHS), "--config FILE")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert "LTXVideoTransformer3DModel" in in_process(
        file, "--config", path, "-o", tmp_path / "out", "--dry-run", *GRAPHS
    )
    options = ExportOptions(
        str(file), tmp_path / "out", get_recipe(RECIPE), targets=("graphs",), latent="2x8x8", config=path
    )
    planned = plan_export(options).checkpoints[0].config
    assert {name: value for name, value in planned.items() if name != PIPELINE} == config
    path.write_text(json.dumps({**config, "auto_map": {}}))
    refused(run(file, "--config", path, "-o", tmp_path / "out", *GRAPHS), "code of its own")
    shutil.copytree(exported, tmp_path / "copy")
    manifest = json.loads((exported / "manifest.json").read_text())
    manifest["source"]["config"] = str(path)
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    assert f"--config {path}" in Artifact.open(tmp_path / "copy").rebuild_command()


def test_pipeline_facts_are_not_looked_for_around_a_file(folders: dict[str, Path], tmp_path: Path) -> None:
    """What lies beside a file that was given alone is another's."""
    file = formats.save_single(
        tmp_path / "transformer" / "m.safetensors", formats.wan_original(formats.folder_tensors(folders["wan"]))
    )
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "expand_timesteps": True}))
    plan = plan_export(
        ExportOptions(str(file), tmp_path / "out", get_recipe(RECIPE), targets=("graphs",), latent="2x8x8")
    )
    assert plan.checkpoints[0].config == formats.WAN
    assert Checkpoint.components(file) == ["transformer"]
