"""What a server needs of a generator besides clips: warm-up, another export without a gap, admission by memory."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.faults import fault_of
from dvdquant.deploy.generation.admission import Admission, estimated_need
from dvdquant.deploy.generation.check import open_checker
from dvdquant.deploy.generation.generate import GenerateRequest, open_generator, reload_generator
from dvdquant.deploy.generation.in_pipeline import PipelineGenerator
from dvdquant.deploy.sessions import open_session
from dvdquant.deploy.sessions.weight_form import claim
from dvdquant.errors import EngineError, OutputError, ResourceError, ShapeError
from dvdquant.system.device_memory import device_memory
from tests.support import tiny_pipelines
from tests.support.commands import in_process
from tests.support.running import PROMPT, short_wan_export, wan_pipeline
from tests.support.session_exports import QUICK, RANGES, recipe_export


@pytest.mark.parametrize("components", [0, 1, 2])
def test_warm_up_runs_every_engine(components: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it, nothing is opened any more; of two transformers both have run."""
    out, folder = wan_pipeline(components) if components else (short_wan_export(), None)
    with open_generator(Artifact.open(out), pipeline=folder, backend="onnxruntime", device="cpu") as generator:
        ran: list[tuple[str, str]] = []
        real = type(generator).denoise

        def noted(self: Any, request: GenerateRequest, *more: Any) -> Any:
            done = real(self, request, *more)
            ran.extend((name, request.mode) for name, records in done.components.items() if records)
            return done

        monkeypatch.setattr(type(generator), "denoise", noted)
        seconds = generator.warm_up()
        assert set(seconds) == {"a4", "a8"}
        assert min(seconds.values()) > 0
        names = ["transformer", "transformer_2"][: max(1, components)]
        assert set(ran) == {(name, mode) for name in names for mode in ("a4", "a8")}
        monkeypatch.setattr(type(generator.options), "open", lambda *_: pytest.fail("a session was opened again"))
        generator.generate(GenerateRequest(generator.checker.example(), steps=2))


@pytest.fixture
def served(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(export in place, another export of the same family and sizes, pipeline)."""
    out, pipeline = wan_pipeline()
    shutil.copytree(out, tmp_path / "out")
    other = tiny_pipelines.export_kind("wan", tmp_path / "other", components=2)
    shutil.rmtree(tmp_path / "other" / "source")
    return tmp_path / "out", other.out, pipeline


def test_a_reload(served: tuple[Path, Path, Path]) -> None:
    """The new export is loaded before the old one is closed; text encoder and VAE stay."""
    out, other, pipeline = served
    old = open_generator(Artifact.open(out), pipeline=pipeline, backend="onnxruntime", device="cpu")
    assert isinstance(old, PipelineGenerator)
    request = GenerateRequest("a red cat", steps=2, seed=3, mode="a8")
    before = old.generate(request)
    assert not old.is_stale()
    shutil.rmtree(out)
    with pytest.raises(OutputError):
        old.is_stale()
    with pytest.raises(OutputError):
        reload_generator(old)
    assert np.array_equal(old.generate(request).frames, before.frames)  # it goes on
    shutil.copytree(other, out)
    assert old.is_stale()
    parts = [pipe.vae for pipe in old.pipes.values()]
    new = reload_generator(old)
    assert isinstance(new, PipelineGenerator)
    with new:
        assert not new.is_stale()
        assert [pipe.vae for pipe in new.pipes.values()] == parts  # not loaded again
        assert new.artifact.components == ("transformer", "transformer_2")
        assert np.array_equal(new.generate(request).frames, before.frames)  # the same weights, in another export
        with pytest.raises(EngineError, match="is closed"):
            new.sessions()["transformer"].close() or new.generate(request)


def test_a_reload_that_fails_leaves_the_old_one(
    served: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, pipeline = served
    with open_generator(Artifact.open(out), pipeline=pipeline, backend="onnxruntime", device="cpu") as old:
        request = GenerateRequest("a red cat", steps=2, seed=3, mode="a8")
        before = old.generate(request)
        closed: list[Any] = []
        real = PipelineGenerator.close

        def close(self: PipelineGenerator) -> None:
            closed.append(self)
            real(self)

        def fails(self: Any, *_: Any) -> Any:
            raise EngineError("the new export cannot be loaded")

        with monkeypatch.context() as patched:
            patched.setattr(PipelineGenerator, "close", close)
            patched.setattr(type(old.options), "open", fails)
            with pytest.raises(EngineError, match="the new export"):
                reload_generator(old)
        assert closed
        assert old not in closed
        assert np.array_equal(old.generate(request).frames, before.frames)


def test_the_need_grows_with_the_clip(tmp_path: Path) -> None:
    in_process(wan_pipeline()[0].parent / "source" / "transformer", "-o", tmp_path / "out", *QUICK, *RANGES)
    checker = open_checker(Artifact.open(tmp_path / "out"), pipeline=wan_pipeline()[1])  # of 32 to 96 pixels in height
    low, high = (checker.check(GenerateRequest("a cat", height=height)) for height in (48, 64))
    assert 0 < estimated_need(checker, low) < estimated_need(checker, high)


def test_published_sizes_have_plausible_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan2.1-14B at 480p and 81 frames: gigabytes, not megabytes and not terabytes."""
    checker = open_checker(Artifact.open(recipe_export("w4a4")), pipeline=wan_pipeline()[1])
    request = dataclasses.replace(GenerateRequest("a cat"), num_frames=81, height=480, width=832)
    monkeypatch.setattr(type(checker), "size_of", lambda *_: dataclasses.make_dataclass("S", ["latent"])((21, 60, 104)))
    config = {**checker.family.config, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
    monkeypatch.setattr(checker.family, "config", config)
    assert 3 << 30 < estimated_need(checker, request) < 12 << 30


def test_admission() -> None:
    checker = open_checker(Artifact.open(wan_pipeline()[0]), pipeline=wan_pipeline()[1])
    request, gate = checker.check(GenerateRequest("a cat")), Admission(checker)
    need = gate.need(request)
    assert need == estimated_need(checker, request)
    gate.check(request, need, need)
    with pytest.raises(ResourceError, match="are free now") as later:
        gate.check(request, need - 1, need)
    with pytest.raises(ShapeError, match="beside the weights") as never:
        gate.check(request, need - 1, need - 1)
    assert [fault_of(later.value), fault_of(never.value)] == ["once", "request"]
    # What was measured counts, and other sizes follow from it.
    gate.note(request, 1000)
    gate.note(request, 900)
    assert gate.need(request) == 1000
    assert gate.need(dataclasses.replace(request, num_frames=2 * (request.num_frames or 0))) == 2000


def test_the_generators_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    free, total = device_memory(torch.device("cpu"))
    assert 0 < free <= total
    with open_generator(Artifact.open(short_wan_export()), device="cpu", backend="onnxruntime") as generator:
        filled = generator.admit(GenerateRequest(PROMPT))
        assert filled == generator.check(GenerateRequest(PROMPT))
        need = generator.admission.need(filled)
        monkeypatch.setattr("dvdquant.deploy.generation.generator.device_memory", lambda device: (need, total))
        assert generator.admit(GenerateRequest(PROMPT)) == filled
        # What a session will take of the device yet is not free.
        with open_session(Artifact.open(short_wan_export()), device="cpu", backend="onnxruntime") as session:
            claim(session, 1)
            with pytest.raises(ResourceError):
                generator.admit(GenerateRequest(PROMPT))
        assert generator.admit(GenerateRequest(PROMPT)) == filled
        monkeypatch.setattr("dvdquant.deploy.generation.generator.device_memory", lambda device: (1, total))
        with pytest.raises(ResourceError):
            generator.admit(GenerateRequest(PROMPT))
        with pytest.raises(ShapeError, match="--steps"):
            generator.admit(GenerateRequest(PROMPT, steps=0))
