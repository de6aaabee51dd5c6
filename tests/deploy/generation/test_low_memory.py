"""Clips without a text encoder in memory, with parts that come and go, and in tiles; what a run takes, said beforehand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dvdquant.artifact.manifest import load_manifest
from dvdquant.cli.plan import main as plan_main
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.check import open_checker
from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
from dvdquant.deploy.generation.needs import parts_of_run
from dvdquant.deploy.generation.text_embeds import load_text_embeds
from dvdquant.deploy.switching.schedule import Schedule
from dvdquant.errors import CheckpointError, DvdquantError, ShapeError
from tests.support.commands import refused
from tests.support.image_pipelines import ImageModel, image_model, picture
from tests.support.running import drawn, run, short_wan_export, wan_pipeline
from tests.support.tiny_pipelines import TOKENS

PROMPTS = ["a red cat", "the dog runs in snow"]
# As many words as the template of HunyuanVideo's own tokenizer needs before them.
LONG = "a red cat runs in the rain the dog sits"


def _request(model: ImageModel | None, **more: Any) -> GenerateRequest:
    images: dict[str, Any] = {} if model is None else {"image": picture(0)}
    return GenerateRequest(PROMPTS[0] if model is None else LONG, **{"steps": 2, "mode": "a8", **images, **more})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings of both prompts, of the tiny Wan."""
    out, pipeline = wan_pipeline()
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    said = drawn(
        *(out, "--pipeline", pipeline, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--save-text-embeds", path),
        *("--negative-prompt", "rain"),
    )
    assert "text embeddings of 2 prompts" in said
    return path


def test_a_clip_without_a_text_encoder(saved: Path, tmp_path: Path) -> None:
    """From a folder that has none: the very frames of the run that encodes by itself."""
    out, pipeline = wan_pipeline()
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    artifact = Artifact.open(out)
    with open_generator(artifact, pipeline=pipeline, backend="pytorch", device="cpu") as generator:
        expected = [generator.generate(replace(_request(None, negative_prompt="rain"), prompt=p)) for p in PROMPTS]
    with open_generator(artifact, pipeline=folder, backend="pytorch", device="cpu", text_embeds=saved) as generator:
        assert generator.prompts() == PROMPTS
        for prompt, wanted in zip(PROMPTS, expected):
            made = generator.generate(replace(_request(None), prompt=prompt))
            np.testing.assert_array_equal(made.frames, wanted.frames)
        with pytest.raises(ShapeError, match="no embedding of 'a blue dog'"):
            generator.check(replace(_request(None), prompt="a blue dog"))
        with pytest.raises(ShapeError, match="another negative prompt"):
            generator.check(_request(None, negative_prompt="snow"))
        assert generator.check(_request(None, guidance=1.0)).guidance == 1.0
    arguments = (out, "--pipeline", folder, "--text-embeds", saved, "--steps", 2, "--backend", "pytorch")
    drawn(*arguments, "-o", tmp_path / "c.mp4", "--trace", tmp_path / "t.json")
    clips = json.loads((tmp_path / "t.json").read_text())["clips"]
    assert [clip["request"]["prompt"] for clip in clips] == PROMPTS
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["c-1.mp4", "c-2.mp4"]


def test_saving_loads_the_text_encoder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a session nor the VAE: the folder may even lack the VAE's weights by then."""
    from dvdquant.deploy.generation import session_options as module

    def loads(*_args: Any, **_options: Any) -> None:
        raise AssertionError("an engine was opened")

    monkeypatch.setattr(module, "open_session", loads)
    model = image_model("hunyuan-concat")
    path = tmp_path / "text.safetensors"
    pipeline = Path(shutil.copytree(model.pipeline, tmp_path / "pipeline"))
    with open_generator(Artifact.open(model.made.out), pipeline=pipeline, device="cpu") as generator:
        request = generator.check(_request(model))
        next((pipeline / "vae").glob("*.safetensors")).unlink()
        generator.save_text_embeds(path, [request])
    held = load_text_embeds(path, Artifact.open(model.made.out).family(), Artifact.open(model.made.out).sizes)
    assert held.tensors[0]["prompt_embeds"].shape == (1, TOKENS + 288, 32)
    assert held.image is not None


def test_a_text_encoder_that_saw_another_image(tmp_path: Path) -> None:
    """HunyuanVideo's text holds the image; the clip of the saved text is that of the whole pipeline."""
    model = image_model("hunyuan-concat")
    artifact, path = Artifact.open(model.made.out), tmp_path / "text.safetensors"
    with open_generator(artifact, pipeline=model.pipeline, backend="pytorch", device="cpu") as generator:
        generator.save_text_embeds(path, [generator.check(_request(model))])
        expected = generator.generate(_request(model))
    options: dict[str, Any] = {"pipeline": model.pipeline, "backend": "pytorch", "device": "cpu", "text_embeds": path}
    with open_generator(artifact, **options) as generator:
        with pytest.raises(ShapeError, match="saw another image"):
            generator.check(_request(model, image=picture(7)))
        np.testing.assert_array_equal(generator.generate(_request(model)).frames, expected.frames)


def test_text_saved_without_guidance(tmp_path: Path) -> None:
    out, pipeline = wan_pipeline()
    path = tmp_path / "text.safetensors"
    drawn(out, "--pipeline", pipeline, "--prompt", PROMPTS[0], "--save-text-embeds", path, "--guidance", 1)
    with open_generator(Artifact.open(out), pipeline=pipeline, text_embeds=path) as generator:
        assert generator.check(_request(None, guidance=1.0)).guidance == 1.0
        with pytest.raises(ShapeError, match="without guidance"):
            generator.check(_request(None, guidance=3.0))


# ------------------------------------------------------------------------------------------------------ hostile files


def _record(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from dvdquant.system.safetensors_reader import read_header

    return load_file(path), json.loads(read_header(path).metadata["dvdquant"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, record: record.update(family="ltx-video"), "of a ltx-video model"),
        (lambda tensors, record: record.update(format="dvdquant text embeddings 9"), "record"),
        (lambda tensors, record: record.update(prompts=[]), "record"),
        (lambda tensors, record: record.update(prompts=["a"] * 300), "record"),
        (lambda tensors, record: record.update(more=1), "record"),
        (lambda tensors, record: record.update(image="x"), "record"),
        (lambda tensors, record: tensors.pop("1.negative_prompt_embeds"), "1.negative_prompt_embeds is missing"),
        (lambda tensors, record: tensors.update(other=torch.zeros(1)), "unknown tensor other"),
        (
            lambda tensors, record: tensors.update({"0.prompt_embeds": tensors["0.prompt_embeds"][:, :5].clone()}),
            "--text-tokens 5",
        ),
        (lambda tensors, record: tensors["0.prompt_embeds"].view(-1).__setitem__(3, float("nan")), "NaN"),
        (lambda tensors, record: tensors.update({"0.prompt_embeds": tensors["0.prompt_embeds"].int()}), "no floats"),
    ],
)
def test_files_that_cannot_be_used(change: Any, said: str, saved: Path, tmp_path: Path) -> None:
    out, _ = wan_pipeline()
    artifact = Artifact.open(out)
    tensors, record = _record(saved)
    change(tensors, record)
    path = tmp_path / "text.safetensors"
    save_file(tensors, path, metadata={"dvdquant": json.dumps(record)})
    with pytest.raises(CheckpointError) as caught:
        load_text_embeds(path, artifact.family(), artifact.sizes)
    assert said in str(caught.value)
    assert caught.value.fix


def test_damaged_and_foreign_files(saved: Path, tmp_path: Path) -> None:
    """Cuts and flips: an error in words, or embeddings that pass every check."""
    out, _ = wan_pipeline()
    artifact = Artifact.open(out)
    raw, generator = saved.read_bytes(), np.random.default_rng(0)
    path, read = tmp_path / "text.safetensors", 0
    for index in range(300):
        data = bytearray(raw)
        for _ in range(int(generator.integers(1, 4))):
            data[int(generator.integers(min(len(data), 900)))] = int(generator.integers(256))
        path.write_bytes(data[: int(generator.integers(len(data)))] if index % 6 == 0 else data)
        try:
            load_text_embeds(path, artifact.family(), artifact.sizes)
            read += 1
        except DvdquantError:
            continue
    assert read < 300
    for foreign in (tmp_path, tmp_path / "gone", out / "manifest.json"):
        with pytest.raises(DvdquantError):
            load_text_embeds(foreign, artifact.family(), artifact.sizes)


# ------------------------------------------------------------------------------------------------ offload, tiles, needs


def _watched_offload(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that diffusers' offload is called with from now on."""
    import diffusers

    offloaded: list[str] = []
    whole = diffusers.DiffusionPipeline.enable_model_cpu_offload

    def offload(self: Any, gpu_id: Any = None, device: Any = "cuda") -> None:
        offloaded.append(str(device))
        whole(self, gpu_id, device)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", offload)
    return offloaded


def test_offloaded_parts_and_tiles_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' offload around the drop-in, to and from the CPU itself; a clip that fits into one tile is unchanged."""
    model = image_model("wan-i2v-21")
    artifact = Artifact.open(model.made.out)
    with open_generator(artifact, pipeline=model.pipeline, backend="pytorch", device="cpu") as generator:
        expected = generator.generate(_request(model))
    offloaded = _watched_offload(monkeypatch)
    options: dict[str, Any] = {"backend": "pytorch", "device": "cpu", "offload": True, "vae_tiling": True}
    with open_generator(artifact, pipeline=model.pipeline, **options) as generator:
        assert any("saves nothing on a CPU" in words for words in generator.notes(generator.check(_request(model))))
        for _ in range(2):
            made = generator.generate(_request(model))
            np.testing.assert_array_equal(made.frames, expected.frames)
        pipe = next(iter(generator.pipes.values()))
        assert pipe.vae.use_tiling
        assert pipe.vae.use_slicing
    assert offloaded[0] == "cpu"


def test_a_plan_with_saved_text_and_parts_that_are_offloaded(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of ``dvdq-plan`` without a text encoder, and with diffusers' offload, is that of a plan that loads everything."""
    out, pipeline = wan_pipeline()
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    offloaded = _watched_offload(monkeypatch)
    made = {}
    for name, more in {
        "everything": ("--pipeline", pipeline, "--prompts", tmp_path / "prompts.txt", "--negative-prompt", "rain"),
        "text": ("--pipeline", folder, "--text-embeds", saved),
        "both": ("--pipeline", folder, "--text-embeds", saved, "--offload", "--vae-tiling"),
    }.items():
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        common = ("--steps", 3, "--last-high", 0, "--delta", 0.3, "--backend", "pytorch", "--device", "cpu")
        result = CliRunner().invoke(plan_main, [str(a) for a in (out, *more, *common, "-o", tmp_path / f"{name}.json")])
        assert result.exit_code == 0, (result.output, result.exception)
        made[name] = Schedule.load(tmp_path / f"{name}.json", load_manifest(out), 3)
    assert offloaded[0] == "cpu"
    for schedule in made.values():
        assert schedule.prompts == tuple(PROMPTS)
        assert schedule.details["stairs"] == made["everything"].details["stairs"]
        assert schedule.components == made["everything"].components


def test_tiles_decode_what_the_whole_does(tmp_path: Path) -> None:
    """Tiles smaller than the clip: other numbers at the seams, the same picture."""
    out, pipeline = wan_pipeline()
    artifact = Artifact.open(out)
    frames = []
    for tiling in (False, True):
        with open_generator(
            artifact, pipeline=pipeline, backend="pytorch", device="cpu", vae_tiling=tiling
        ) as generator:
            generator.prepare(_request(None))
            vae = next(iter(generator.pipes.values())).vae
            vae.tile_sample_min_height = vae.tile_sample_min_width = 24
            vae.tile_sample_stride_height = vae.tile_sample_stride_width = 16
            frames.append(generator.generate(_request(None)).frames.astype(int))
    assert frames[0].shape == frames[1].shape
    assert 0 < np.abs(frames[0] - frames[1]).mean() < 64


def test_what_a_run_takes(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those of the parts as they are loaded; nothing is loaded or written to say so."""
    import diffusers
    import transformers

    from dvdquant.deploy.generation import session_options as module

    monkeypatch.setattr(module, "open_session", lambda *_a, **_k: pytest.fail("an engine was opened"))
    out, pipeline = wan_pipeline()
    artifact = Artifact.open(out)
    checker = open_checker(artifact, pipeline=pipeline)
    requests = [checker.check(_request(None, mode=mode)) for mode in ("16", "a8")]
    parts = {part.name: part for part in parts_of_run(checker, requests, "pytorch", offload=False)}
    encoder = transformers.UMT5EncoderModel.from_pretrained(pipeline / "text_encoder")
    vae = diffusers.AutoencoderKLWan.from_pretrained(pipeline / "vae")
    original = diffusers.WanTransformer3DModel.from_pretrained(pipeline / "transformer")
    assert parts["text_encoder"].loaded == 2 * sum(p.numel() for p in encoder.parameters())
    assert parts["vae"].loaded == 4 * sum(p.numel() for p in vae.parameters())
    assert parts["transformer (16 bit)"].loaded == 2 * sum(p.numel() for p in original.parameters())
    assert parts["transformer (packed weights)"].stored == sum(
        (out / name).stat().st_size for name in artifact.weight_files("transformer")
    )
    assert all(part.stays for part in parts.values())
    leaving = parts_of_run(checker, requests, "pytorch", offload=True)
    assert {part.name for part in leaving if not part.stays} == {"text_encoder", "vae"}
    # Engines with the plugin have the packed weights beside them.
    engine: Any = {"path": "engines/sm89/transformer_a8.engine", "act_bits": 8, "precision": "plugin"}
    engine |= {"backend": "tensorrt", "kept_inputs": 500}
    files: Any = {**artifact.manifest.files, engine["path"]: {"sha256": "0" * 64, "bytes": 1000}}
    manifest = replace(artifact.manifest, engines=[engine], files=files)
    built = open_checker(Artifact(artifact.root, manifest, artifact.configs), pipeline=pipeline)
    found = {part.name: part for part in parts_of_run(built, requests[1:], "tensorrt", offload=False)}
    packed = parts["transformer (packed weights)"].loaded
    part = found["transformer (engines, packed weights)"]
    assert part.stored == packed + 1000
    inputs = sum(
        dtype.itemsize * torch.Size(shape).numel()
        for spec in artifact.plan().layers
        for name, (dtype, shape) in spec.tensors().items()
        if "pre_quant" not in name
    )
    assert part.loaded == inputs + 500 + 1000
    said = drawn(out, "--pipeline", pipeline, "--prompt", PROMPTS[0], "--dry-run", "--offload", "--steps", 3)
    assert "WanPipeline" in said
    assert "while text is encoded" in said
    assert "3 steps" in said
    without = drawn(out, "--pipeline", pipeline, "--text-embeds", saved, "--dry-run")
    assert "text_encoder" not in without
    assert "2 prompts" in without
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt", "a cat"), ("where the clip goes", "-o clip.mp4")),
        (("--prompt", "a cat", "--save-text-embeds", "t.safetensors", "-o", "c.mp4"), ("-o does not apply",)),
        (("--save-text-embeds", "t.safetensors"), ("no prompt",)),
        (("--text-embeds", "gone.safetensors", "-o", "c.mp4"), ("gone.safetensors", "--save-text-embeds")),
        (("--text-embeds", "t.safetensors", "--text-encoder-bits", "8", "-o", "c.mp4"), ("-bits does not apply",)),
        (("--prompt", "a cat", "--backend", "rtx", "--compile", "-o", "c.mp4"), ("--backend rtx does not apply",)),
    ],
)
def test_options_that_clash(
    options: tuple[str, ...], said: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, pipeline = wan_pipeline()
    refused(run(out, "--pipeline", pipeline, *options), *said)
    assert not list(tmp_path.iterdir())


def test_a_prompt_table_has_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = short_wan_export()
    prompt = ("--prompt", "ring red right large black")
    for more in (("--offload",), ("--vae-tiling",), ("--save-text-embeds", "t.safetensors"), ("--image", "a.png")):
        target = () if "--save-text-embeds" in more else ("-o", "c.mp4")
        refused(run(out, *prompt, *more, *target), "prompt table")
    assert "packed weights" in drawn(out, *prompt, "--dry-run")
    assert not list(tmp_path.iterdir())
