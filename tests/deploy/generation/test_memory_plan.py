"""What a run holds when, arrangements that fit a memory, and the parts of a run that come and go for them."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.check import open_checker
from dvdquant.deploy.generation.device_fit import DeviceSize, fit
from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
from dvdquant.deploy.generation.memory_plan import PACKED, Arrangement, Loaded, RunBytes, arrange, fitting, possible
from dvdquant.deploy.generation.needs import parts_of_run, run_bytes
from dvdquant.errors import ResourceError, ShapeError, UnsupportedError
from dvdquant.hardware.weights import WeightPolicy
from dvdquant.system.memory import parse_amount
from dvdquant.text import amount
from tests.support.commands import refused
from tests.support.running import drawn, run, wan_pipeline

GIB = 1 << 30
PROMPTS = ["a red cat", "the dog runs in snow"]
BOTH, A8 = Loaded("engines", (4, 8)), Loaded("engines", (8,))
RUN = RunBytes(
    text={16: 11 * GIB, 8: 6 * GIB},
    image=0,
    vae=GIB // 2,
    transformer={BOTH: 9 * GIB, A8: 7 * GIB, Loaded("engines", (4,)): 4 * GIB},
    step=2 * GIB,
    decode={False: 8 * GIB, True: 2 * GIB},
    base=GIB,
)


def test_stages_hold_what_they_need() -> None:
    """Computed by hand for each arrangement."""
    everything = arrange(RUN, Arrangement(BOTH))
    text, steps, frames = everything.stages
    assert text.parts == {"text encoder": 11 * GIB, "a4 and a8": 9 * GIB, "VAE": GIB // 2}
    assert steps.total == 11 * GIB + 9 * GIB + GIB // 2 + 2 * GIB + GIB
    assert frames.total == everything.peak == 11 * GIB + 9 * GIB + GIB // 2 + 8 * GIB + GIB
    apart = arrange(RUN, Arrangement(BOTH, vae_tiling=True, alternate=True))
    assert [sum(stage.parts.values()) for stage in apart.stages] == [11 * GIB, 9.5 * GIB, 9.5 * GIB]
    offloaded = arrange(RUN, Arrangement(A8, vae_tiling=True, offload=True, text_bits=8))
    assert [sum(stage.parts.values()) for stage in offloaded.stages] == [13 * GIB, 7 * GIB, 7.5 * GIB]
    assert json.loads(json.dumps(apart.to_json()))["peak"] == apart.peak == 9.5 * GIB + 2 * GIB + GIB


@pytest.mark.parametrize(
    ("memory", "unified", "words"),
    [
        (40, False, "a4 and a8"),
        (24, False, "a4 and a8, VAE in tiles"),
        (22, False, "a4 and a8, parts offloaded"),
        (20, True, "a4 and a8, text encoder before the transformer"),
        (13, True, "a4 and a8, VAE in tiles, text encoder before the transformer"),
        (12, True, "a8, VAE in tiles, text encoder before the transformer, text encoder in 8 bits"),
        (8, True, "a4, VAE in tiles, text encoder before the transformer, text encoder in 8 bits"),
    ],
)
def test_the_cheapest_arrangement_that_fits(memory: int, unified: bool, words: str) -> None:
    plan = fitting(RUN, memory * GIB, unified=unified)
    assert plan.peak <= memory * GIB
    assert plan.arrangement.words() == words
    # Nothing that costs less would have fitted.
    before = possible(RUN, unified=unified)
    assert all(each.peak > memory * GIB for each in before[: before.index(plan)])


def test_what_never_fits_is_refused_with_what_does() -> None:
    with pytest.raises(ResourceError) as caught:
        fitting(RUN, 6 * GIB, unified=True)
    assert "7.5 GiB at least" in caught.value.what
    assert "while steps are taken: a4 4.0 GiB, VAE 512.0 MiB, and 2.0 GiB to work in" in caught.value.what
    assert "smaller or shorter clip" in str(caught.value.fix)
    with pytest.raises(ResourceError, match=r"16\.2 GiB at least.*while text is encoded") as of_text:
        fitting(RUN, 12 * GIB, unified=False, fixed={"transformer": BOTH, "alternate": False, "text_bits": 8})
    assert "--text-embeds" in str(of_text.value.fix)


def test_options_for_an_arrangement() -> None:
    how = Arrangement(A8, vae_tiling=True, offload=True, alternate=True, text_bits=8)
    assert how.options(BOTH) == [
        "--mode",
        "a8",
        "--vae-tiling",
        "--offload",
        "--alternate",
        "--text-encoder-bits",
        "8",
    ]
    assert Arrangement(BOTH).options(BOTH) == []


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 16 * GIB), ("1.5 G", 3 * GIB // 2), ("700mib", 700 << 20), ("16GB", 16 * 10**9)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_amount(text, "--memory") == size


@pytest.mark.parametrize("text", ["16", "GiB", "-1GiB", "0GiB", "1e9GiB", "16GiBs", "٣GiB", "1" * 400 + "GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ShapeError, match="--memory"):
        parse_amount(text, "--memory")


def test_devices_that_are_sold() -> None:
    """Orin's 16 GB are shared with the system; a card's are not, and it can offload."""
    orin, card = DeviceSize("Orin", 16, ("8.7",), unified=True), DeviceSize("RTX", 16, ("8.9",))
    small = DeviceSize("RTX", 8, ("8.9",))
    found = fit(RUN, [orin, card, small])
    assert [each.fits for each in found] == [True, True, False]
    assert found[0].words(BOTH) == "fits: VAE in tiles, text encoder before the transformer (12.5 GiB)"
    # Of 16 GB its system sees 15656 MiB, and keeps two GiB.
    assert found[0].plan.peak <= orin.usable == (15656 << 20) - 2 * GIB
    assert card.usable == 15 * GIB
    assert found[2].words(BOTH).startswith("no: 7.5 GiB at least")


# --------------------------------------------------------------------------------------------------- parts come and go


def _requests() -> list[GenerateRequest]:
    return [GenerateRequest(prompt, steps=2, mode="a8") for prompt in PROMPTS]


def test_the_text_encoder_is_gone_before_the_transformer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same frames, bit by bit; and never both in memory."""
    from dvdquant.deploy.generation import in_pipeline
    from dvdquant.deploy.generation import session_options as module

    out, pipeline = wan_pipeline()
    artifact = Artifact.open(out)
    options: dict[str, Any] = {"pipeline": pipeline, "backend": "pytorch", "device": "cpu"}
    with open_generator(artifact, **options) as generator:
        expected = [generator.generate(request).frames for request in _requests()]
    encoders: list[weakref.ref[Any]] = []
    opened = []
    whole, session = diffusers.WanPipeline.from_pretrained, module.open_session

    def open_pipeline(*args: Any, **more: Any) -> Any:
        pipe = whole(*args, **more)
        if pipe.text_encoder is not None:
            encoders.append(weakref.ref(pipe.text_encoder))
        return pipe

    def open_session(*args: Any, **more: Any) -> Any:
        gc.collect()
        assert encoders
        assert all(encoder() is None for encoder in encoders)
        opened.append(session(*args, **more))
        return opened[-1]

    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", open_pipeline)
    monkeypatch.setattr(module, "open_session", open_session)
    with open_generator(artifact, alternate=True, **options) as generator:
        generator.encode_ahead([generator.check(request) for request in _requests()])
        for request, frames in zip(_requests(), expected):
            np.testing.assert_array_equal(generator.generate(request).frames, frames)
        assert (len(encoders), len(opened)) == (1, 1)
        # Another prompt: the transformer makes room, and comes again.
        generator.generate(GenerateRequest("a blue dog", steps=2, mode="a8"))
        assert (len(encoders), len(opened)) == (2, 2)
        assert opened[0].closed
        # Of the texts before, those stay that are asked for again.
        monkeypatch.setattr(in_pipeline, "MOST_ENCODED", 1)
        asked = [generator.check(GenerateRequest(text, steps=2, mode="a8")) for text in ("a blue dog", "a green bird")]
        generator.encode_ahead(asked)
        assert len(encoders) == 3
        generator.encode_ahead(asked)
        assert len(encoders) == 3
        generator.encode_ahead([generator.check(_requests()[0])])
        assert len(encoders) == 4


def test_one_width_is_loaded_alone() -> None:
    out, pipeline = wan_pipeline()
    options: dict[str, Any] = {"pipeline": pipeline, "backend": "pytorch", "device": "cpu"}
    with open_generator(Artifact.open(out), bits=(8,), **options) as generator:
        result = generator.generate(_requests()[0])
    assert result.executed["activation_bits"] == [8]


@pytest.mark.parametrize("few", [8, 4])
def test_a_text_encoder_in_few_bits(few: int) -> None:
    if few == 8:
        pytest.importorskip("torchao", reason="needs torchao: pip install 'dvdquant[text-int8]'")
    out, pipeline = wan_pipeline()
    artifact = Artifact.open(out)
    made, loaded = [], []
    for bits in (16, few):
        options: dict[str, Any] = {"pipeline": pipeline, "backend": "pytorch", "device": "cpu"}
        with open_generator(artifact, text_encoder_bits=bits, **options) as generator:
            request = generator.check(_requests()[0])
            made.append(generator.encode_prompt(request)["prompt_embeds"].float())
            encoder = next(iter(generator.pipes.values())).text_encoder
            loaded.append(sum(map(_stored, encoder.parameters())))
    assert 0 < float((made[1] - made[0]).norm() / made[0].norm()) < {8: 0.05, 4: 0.25}[few]
    checker = open_checker(artifact, pipeline=pipeline)
    known = run_bytes(checker, [checker.check(_requests()[0])], "pytorch", 0, narrow=False)
    assert (known.text[16], known.text[few]) == (loaded[0], loaded[1])
    assert known.text[4] < known.text[8] < known.text[16]


def _stored(tensor: torch.Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(getattr(tensor, name).nbytes for name in names)


def test_without_torchao_8_bits_are_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    whole = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "torchao" else whole(name, *more)
    )
    out, pipeline = wan_pipeline()
    with pytest.raises(UnsupportedError, match="torchao") as caught:
        open_generator(Artifact.open(out), pipeline=pipeline, text_encoder_bits=8)
    assert "text-int8" in str(caught.value.fix)


# --------------------------------------------------------------------------------------------------------- the command


def _words(out: Path, pipeline: Path) -> tuple[object, ...]:
    return (out, "--pipeline", pipeline, "--prompt", PROMPTS[0], "--steps", 2, "--device", "cpu")


def test_the_command_plans_refuses_and_draws(tmp_path: Path) -> None:
    out, pipeline = wan_pipeline()
    arguments = (*_words(out, pipeline), "--backend", "pytorch")
    said = drawn(*arguments, "--memory", "auto", "--dry-run")
    assert "while" in said
    assert "to work in" in said
    for stage in ("text is encoded", "steps are taken", "frames are decoded"):
        assert stage in said
    refused(run(*arguments, "--memory", "1MiB", "-o", tmp_path / "c.mp4"), "at least", "1.0 MiB")
    refused(run(*arguments, "--memory", "lots", "-o", tmp_path / "c.mp4"), "--memory")
    assert not list(tmp_path.iterdir())
    for name, more in (("plain", ()), ("apart", ("--alternate", "--memory", "auto"))):
        drawn(*arguments, *more, "-o", tmp_path / f"{name}.gif")
    assert (tmp_path / "plain.gif").read_bytes() == (tmp_path / "apart.gif").read_bytes()


def test_a_device_that_is_too_small_is_refused_with_what_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dvdquant.cli.clips import run_memory

    out, pipeline = wan_pipeline()
    arguments = (*_words(out, pipeline), "-o", tmp_path / "c.gif")
    whole = run_memory.place_of
    checker = open_checker(Artifact.open(out), pipeline=pipeline)
    known = run_bytes(checker, [checker.check(_requests()[0])], "onnxruntime", 0, narrow=False)
    peaks = {alternate: arrange(known, Arrangement(PACKED, alternate=alternate)).peak for alternate in (False, True)}
    assert peaks[True] < peaks[False]

    def place(total: int, free: int | None = None) -> Any:
        def of(device: torch.device) -> Any:
            found = whole(device)
            return run_memory.Place(found.name, total, total if free is None else free, found.unified, 0, None)

        return of

    monkeypatch.setattr(run_memory, "place_of", place(peaks[False] - 1))
    refused(run(*arguments), "the run takes about", "--memory auto")
    monkeypatch.setattr(run_memory, "place_of", place(1000))
    refused(run(*arguments), "nothing at this size")
    # Other programs hold what it needs: what is free counts, and not what the device has; --memory says otherwise.
    busy, free = 64 * GIB, peaks[False] - 1
    monkeypatch.setattr(run_memory, "place_of", place(busy, free))
    held = f"end the programs that hold the other {amount(busy - free)}"
    refused(run(*arguments), f"{amount(free)} free of 64.0 GiB", "--memory auto", held)
    drawn(*arguments, "--dry-run", "--memory", "64GiB")
    monkeypatch.setattr(run_memory, "place_of", place(busy, 1000))
    refused(run(*arguments), "nothing at this size", held.rpartition(" hold")[0])
    monkeypatch.setattr(run_memory, "place_of", place(busy, peaks[False]))
    drawn(*arguments, "--dry-run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", ["packed", "expanded", "auto"])
@pytest.mark.parametrize("plugin", [False, True])
def test_the_parts_of_a_run_are_those_of_its_plan(
    policy: WeightPolicy, plugin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form that was chosen, by its name, and its bytes: for sessions on our kernels and for engines with the plugin."""
    out, pipeline = wan_pipeline()
    artifact = Artifact.open(out)
    if plugin:
        engine: Any = {"path": "engines/sm90/transformer_a8.engine", "act_bits": 8, "precision": "plugin"}
        engine |= {"backend": "tensorrt", "kept_inputs": 500}
        files: Any = {**artifact.manifest.files, engine["path"]: {"sha256": "0" * 64, "bytes": 10_000}}
        manifest = dataclasses.replace(artifact.manifest, engines=[engine], files=files)
        artifact = Artifact(artifact.root, manifest, artifact.configs)
    checker = open_checker(artifact, pipeline=pipeline)
    requests, backend = [checker.check(_requests()[0])], "tensorrt" if plugin else "pytorch"
    planned = run_bytes(checker, requests, backend, 0, narrow=False, sm="9.0", weights=policy)
    parts = parts_of_run(checker, requests, backend, offload=False, sm="9.0", weights=policy)
    (part,) = (part for part in parts if part.name.startswith("transformer"))
    first = next(iter(planned.transformer))
    assert part.name == f"transformer ({'engines, ' if plugin else ''}{first})"
    assert part.loaded == planned.transformer[first]
    # So few tokens, that whatever is packed costs too much; and a form that differs says so.
    assert str(first) == ("packed weights" if policy == "packed" else "expanded weights")


def test_the_command_names_the_form_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from dvdquant.cli.clips import run_memory
    from dvdquant.ops import cuda_linear

    out, pipeline = wan_pipeline()
    monkeypatch.setattr(
        run_memory, "place_of", lambda device: run_memory.Place("GPU", 64 * GIB, 64 * GIB, False, 0, "9.0")
    )
    monkeypatch.setattr(cuda_linear, "usable_kernels", lambda device: object())
    words = (*_words(out, pipeline), "--backend", "pytorch", "--dry-run")
    for policy in ("packed", "expanded"):
        said = drawn(*words, "--weights", policy)
        assert f"transformer ({policy} weights)" in said
        (row,) = (line for line in said.splitlines() if line.startswith("steps are taken"))
        assert f"{policy} weights" in row


def test_a_gpu_that_our_kernels_do_not_run_on_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch runs there without them, and keeps what the files hold."""
    from dvdquant.cli.clips import run_memory

    out, pipeline = wan_pipeline()
    monkeypatch.setattr(
        run_memory, "place_of", lambda device: run_memory.Place("GPU", 64 * GIB, 64 * GIB, False, 0, "7.5")
    )
    said = drawn(
        out, "--pipeline", pipeline, "--prompt", PROMPTS[0], "--device", "cpu", "--backend", "pytorch", "--dry-run"
    )
    assert "packed weights" in said
