"""Image to video in every family's own diffusers pipeline, from the image to the frames, beside PyTorch's quantized model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dvdquant.cli.plan import main as plan_main
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation import images
from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
from dvdquant.deploy.report.page import collect, render_report
from dvdquant.deploy.report.text import python_lines
from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.system.progress import Progress
from tests.support.commands import in_process, refused
from tests.support.image_pipelines import WITH_GRAPHS, ImageModel, image_model, picture
from tests.support.running import decode, drawn, run, wan_pipeline
from tests.support.tiny_pipelines import TOKENS, Judge, relative

FACTOR, ATOL = 2.0, 1e-6
PROMPT = "a red cat runs in the rain the dog sits"
STEPS = 3
BOTH = ("pytorch", "onnxruntime")
PYTORCH = ("wan-i2v-21", "wan-ti2v-5b", "ltx-i2v", "ltx-condition", "cogvideox-i2v", "hunyuan-concat")
# FLF2V and token_replace differ from their siblings in what the pipeline gives, not in how a graph runs it.
CASES = [
    *(pytest.param(kind, BOTH, id=kind) for kind in WITH_GRAPHS),
    *(pytest.param(kind, ("pytorch",), id=kind) for kind in PYTORCH),
    pytest.param("wan-flf2v", ("pytorch",), id="wan-flf2v"),
    pytest.param("hunyuan-token", ("pytorch",), id="hunyuan-token", marks=pytest.mark.stress),
    *(pytest.param(kind, ("onnxruntime",), id=f"{kind}-graphs", marks=pytest.mark.stress) for kind in PYTORCH),
]


def request(model: ImageModel, **more: Any) -> GenerateRequest:
    """A short clip of a model, with the images that it needs."""
    last = picture(1) if model.last else None
    frames = 9 if model.kind.startswith("ltx") else None  # so that the last image's tokens fit into the graphs
    asked = GenerateRequest(
        PROMPT, steps=STEPS, seed=3, mode="a8", image=picture(0), last_image=last, num_frames=frames
    )
    return replace(asked, **more)


def by_hand(
    model: ImageModel, transformers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, wrap: Any = None
) -> tuple[Any, Any]:
    """(frames, last latents) of diffusers' own pipeline, loaded from the folder and called as its documentation says."""
    import diffusers
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
    from diffusers.pipelines.wan import pipeline_wan_i2v

    # A package that repairs text; there is nothing to repair.
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=lambda text: text), raising=False)
    dtypes = {"default": torch.bfloat16}
    if model.kind.startswith("wan"):
        dtypes["vae"] = torch.float32
    pipe = getattr(diffusers, model.class_name).from_pretrained(model.pipeline, torch_dtype=dtypes, **transformers)
    if wrap is not None:
        pipe.register_modules(**{name: wrap(transformer) for name, transformer in transformers.items()})
    pipe.set_progress_bar_config(disable=True)
    images: dict[str, Any] = {"image": picture(0)}
    if model.kind == "ltx-condition":
        images = {"conditions": [LTXVideoCondition(picture(0), None, 0), LTXVideoCondition(picture(1), None, 8)]}
    elif model.last:
        images["last_image"] = picture(1)
    frames, height, width = {"ltx": (9, 96, 128), "wan-ti2v-5b": (5, 64, 64)}.get(
        "ltx" if model.kind.startswith("ltx") else model.kind, (5, 32, 32)
    )
    latents: list[Any] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [_as_given(model.kind, values["latents"].float())]
        return {}

    words = 16 if model.kind.startswith("hunyuan") else TOKENS
    made = pipe(
        prompt=PROMPT, **images, num_inference_steps=STEPS, num_frames=frames, height=height, width=width,
        generator=torch.Generator().manual_seed(3), output_type="np", max_sequence_length=words, callback_on_step_end=keep,
    ).frames[0]  # fmt: skip
    return np.rint(made.astype(np.float64).clip(0, 1) * 255).astype(np.uint8), latents[0]


def _as_given(kind: str, latents: torch.Tensor) -> torch.Tensor:
    """The latents of a step as the runtime gives the last ones."""
    if kind == "ltx-condition":  # without the tokens of the last image, and as a grid
        return latents[:, 12:].reshape(1, 2, 3, 4, -1).permute(0, 4, 1, 2, 3)
    return latents[:, :, 1:] if kind == "wan-ti2v-5b" else latents  # the first frame is put back after the loop


@pytest.mark.parametrize(("kind", "backends"), CASES)
def test_a_clip_from_an_image_is_that_of_pytorch(
    kind: str, backends: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PyTorch to the bit, where guidance is two calls; on ONNX Runtime as near the float64 model as PyTorch is."""
    model = image_model(kind, "onnxruntime" in backends)
    artifact = Artifact.open(model.made.out)
    references = {name: model.made.reference(8, name) for name in model.made.plans}
    frames, latents = by_hand(model, references, monkeypatch)
    assert np.unique(frames).size > 8
    same = kind.startswith(("wan", "hunyuan"))
    exact = None if same and backends == ("pytorch",) else by_hand(model, references, monkeypatch, Judge)[1]
    for backend in backends:
        with open_generator(artifact, pipeline=model.pipeline, backend=backend, device="cpu") as generator:
            made = generator.generate(request(model))
        given = made.latents[:, :, 1:] if kind == "wan-ti2v-5b" else made.latents
        assert made.frames.shape == frames.shape
        assert sorted({record.step for record in made.trace}) == list(range(STEPS))
        assert made.executed["pipeline"] == model.class_name
        assert made.executed["images"]["image"]["size"] == [40, 36]
        if backend == "pytorch" and same:
            np.testing.assert_array_equal(given, latents)
            np.testing.assert_array_equal(made.frames, frames)
        else:
            assert relative(given, exact) <= FACTOR * relative(latents, exact) + ATOL


@pytest.mark.parametrize("kind", ["wan-i2v-21", "cogvideox-i2v", "hunyuan-concat", "ltx-i2v"])
def test_another_image_is_another_clip(kind: str) -> None:
    """A family each: with random weights an image changes less than a bound of the test above allows."""
    model = image_model(kind)
    with open_generator(Artifact.open(model.made.out), pipeline=model.pipeline, backend="pytorch") as generator:
        one, other, again = (generator.generate(request(model, image=picture(seed), steps=2)) for seed in (0, 5, 0))
    assert not np.array_equal(one.latents, other.latents)
    assert not np.array_equal(one.frames, other.frames)
    np.testing.assert_array_equal(one.latents, again.latents)
    np.testing.assert_array_equal(one.frames, again.frames)


def test_an_image_that_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip begins with the image that was checked, and the next clip with the one that is there then."""
    model, path, opened, real = image_model("wan-i2v-21"), tmp_path / "image.png", [], images.open_picture
    monkeypatch.setattr(images, "open_picture", lambda *given: opened.append(given) or real(*given))
    with open_generator(Artifact.open(model.made.out), pipeline=model.pipeline, backend="pytorch") as generator:
        seen = []
        for seed in (0, 5):
            picture(seed).save(path)
            checked = generator.check(request(model, image=path, steps=1))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            picture(7).save(path)
            done = generator.denoise(generator.check(checked), generator.encode_prompt(checked))
            assert done.executed["images"]["image"]["sha256"] == digest
            seen.append(done.latents)
        assert len(opened) == 2
        given = generator.check(request(model, image=picture(0), steps=1))
        embeddings = generator.encode_prompt(given)
        opened.clear()
        done = generator.denoise(given, embeddings)
        assert len(opened) == 1  # an image of Pillow is converted once a clip
    assert torch.equal(done.latents, seen[0])
    assert not torch.equal(done.latents, seen[1])


@pytest.mark.parametrize("kind", ["wan-ti2v-5b", "ltx-i2v", "ltx-condition"])
def test_models_of_both_kinds_draw_from_text_alone_too(kind: str) -> None:
    """With one generator, whose pipelines of two classes share their parts."""
    model = image_model(kind)
    names = {"wan-ti2v-5b": "WanPipeline", "ltx-i2v": "LTXPipeline", "ltx-condition": "LTXConditionPipeline"}
    with open_generator(Artifact.open(model.made.out), pipeline=model.pipeline, backend="pytorch") as generator:
        text = generator.generate(request(model, image=None, last_image=None, steps=2))
        image = generator.generate(request(model, steps=2))
        again = generator.generate(request(model, image=None, last_image=None, steps=2))
    assert text.executed["pipeline"] == names[kind]
    assert image.executed["pipeline"] == model.class_name
    np.testing.assert_array_equal(text.frames, again.frames)
    assert not np.array_equal(text.frames, image.frames)


def test_two_transformers_share_the_count_of_steps() -> None:
    """This pipeline passes no step: the second transformer would begin at 0, and have no last steps on the high engine."""
    model = image_model("wan-i2v-22")
    with open_generator(Artifact.open(model.made.out), pipeline=model.pipeline, backend="pytorch") as generator:
        made = generator.generate(request(model, steps=5))
    steps = {name: sorted({record.step for record in records}) for name, records in made.components.items()}
    assert steps["transformer"] + steps["transformer_2"] == list(range(5))
    assert len(steps["transformer_2"]) > 1
    assert [record.step for record in made.trace] == [step for step in range(5) for _ in range(2)]


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("wan-i2v-21", {"image": None}, ("an image", "--image is missing")),
        ("wan-i2v-21", {"last_image": picture(1)}, ("no last image",)),
        ("wan-i2v-22", {"image": None, "last_image": picture(1)}, ("--image is missing",)),
        ("wan-ti2v-5b", {"last_image": picture(1)}, ("no last image",)),
        ("ltx-i2v", {"last_image": picture(1)}, ("no last image",)),
        ("cogvideox-i2v", {"image": None}, ("--image is missing",)),
        ("hunyuan-concat", {"last_image": picture(1)}, ("no last image",)),
    ],
)
def test_images_that_a_model_does_not_take_or_lacks(kind: str, change: dict[str, Any], said: tuple[str, ...]) -> None:
    """Before anything is loaded: the generator's sessions are never opened."""
    model = image_model(kind)
    with (
        open_generator(Artifact.open(model.made.out), pipeline=model.pipeline) as generator,
        pytest.raises(UnsupportedError) as caught,
    ):
        generator.prepare(request(model, **change))
    assert all(text in str(caught.value) for text in said)


def test_a_model_of_text_takes_no_image() -> None:
    out, pipeline = wan_pipeline()
    with open_generator(Artifact.open(out), pipeline=pipeline) as generator:
        for image in ("image", "last_image"):
            with pytest.raises(UnsupportedError, match=r"(?s)text alone.*TI2V-5B"):
                generator.prepare(GenerateRequest("a cat", steps=2, **{image: picture(0)}))


def test_a_last_image_that_the_graphs_have_no_room_for() -> None:
    """LTX-Video's last image takes the tokens of one more latent frame."""
    model = image_model("ltx-condition")
    with open_generator(Artifact.open(model.made.out), pipeline=model.pipeline) as generator:
        with pytest.raises(ShapeError, match=r"adds the tokens of one latent frame, 12") as caught:
            generator.check(request(model, num_frames=17))
        assert "--num-frames 17:25" in str(caught.value.fix)
        assert generator.check(request(model, num_frames=9)).num_frames == 9


def test_the_commands_take_images(tmp_path: Path) -> None:
    """A photo that lies on its side: 16 bit, a8, switching and a4, the plan, and what the trace says of the image."""
    model = image_model("wan-i2v-21")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = tmp_path / "photo.jpg"
    picture(0, 64, 32).save(photo, exif=exif)
    arguments = (model.made.out, "--pipeline", model.pipeline, "--prompt", "a red cat", "--steps", 4, "--image", photo)
    arguments += ("--backend", "pytorch")
    said = drawn(*arguments, "-o", tmp_path / "c.mp4", "--compare", "--trace", tmp_path / "t.json")
    assert "32×64 pixels and is stretched to 32×32" in said.replace("\n", " ")
    clips = json.loads((tmp_path / "t.json").read_text())["clips"]
    assert [clip["request"]["mode"] for clip in clips] == ["16", "a8", "switch", "a4"]
    assert decode(tmp_path / "c.mp4").shape[0] == 5
    for clip in clips:
        assert clip["request"]["image"] == str(photo)
        assert clip["executed"]["images"]["image"]["size"] == [32, 64]
        assert clip["executed"]["images"]["image"]["sha256"] == hashlib.sha256(photo.read_bytes()).hexdigest()
    assert clips[1]["psnr_to_16_bit"] > 20
    planned = CliRunner().invoke(
        plan_main, [str(a) for a in (*arguments, "-o", tmp_path / "s.json", "--average-bits", 7, "--last-high", 0)]
    )
    assert planned.exit_code == 0, planned.output
    assert json.loads((tmp_path / "s.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), ("--image is missing",)),
        (("--image", "gone.png"), ("gone.png", "cannot be read")),
        (("--image", "text.png"), ("text.png", "no image", "PNG")),
        (("--image", "text.png", "--last-image", "text.png"), ("no last image",)),
    ],
)
def test_images_of_the_commands_are_refused(
    options: tuple[str, ...], said: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = image_model("wan-i2v-21")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("a red cat")
    refused(run(model.made.out, "--pipeline", model.pipeline, "--prompt", "a cat", "-o", "c.mp4", *options), *said)
    assert [path.name for path in tmp_path.iterdir()] == ["text.png"]


def test_what_the_dry_run_and_the_report_say_of_images(tmp_path: Path) -> None:
    """The variant and its images; commands and Python lines of the page have them."""
    model = image_model("wan-i2v-21")
    said = in_process(model.pipeline, "-o", tmp_path / "out", "--dry-run", "--latent", "2x4x4", "--text-tokens", TOKENS)
    assert "takes a first image (required)" in said
    manifest = Artifact.open(model.made.out).manifest
    page = collect(model.made.out, manifest, Progress())
    assert page.images.first == "required"
    html = render_report(page)
    assert "--image first.png" in html
    assert "WanImageToVideoPipeline.from_pretrained" in html
    lines = python_lines(manifest, "out", "a cat", table=False, images=page.images)
    compile(lines, "report.html", "exec")
    assert 'image=load_image("first.png")' in lines
