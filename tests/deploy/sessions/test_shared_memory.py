"""Where the GPU's memory is the host's, as on a Jetson or a GB10, the weights are held once. On doubles of the device."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.cli.clips import run_memory
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.check import open_checker
from dvdquant.deploy.generation.generate import GenerateRequest
from dvdquant.deploy.generation.memory_plan import PACKED, Arrangement, arrange
from dvdquant.deploy.generation.needs import run_bytes
from dvdquant.deploy.sessions import engines, onnxruntime, private_copy, pytorch
from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession
from dvdquant.deploy.sessions.private_copy import bytes_beside, fits_in_memory
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.deploy.sessions.weight_form import claimed_bytes
from dvdquant.deploy.sessions.weights import WeightFiles
from dvdquant.errors import UnsupportedError
from dvdquant.model.held_weights import held_weights
from dvdquant.model.quantized_model import quant_linears
from dvdquant.recipe import ActivationSpec
from dvdquant.system import mounts
from tests.support import session_exports as made
from tests.support.gpu_memory import GPU, gpu_double
from tests.support.kernel_layers import CPU, double, small_layer, tokens
from tests.support.running import drawn, wan_pipeline
from tests.support.weight_files import watch_weight_files

GIB = 1 << 30


def copies_of(files: WeightFiles) -> set[bool]:
    """Whether the copies are in memory: True, False, or both."""
    return {copy.in_memory for copy in files.copies}


def no_disk(patched: pytest.MonkeyPatch) -> None:
    """Temporary files have no room but in memory."""
    patched.setattr(private_copy, "is_in_memory", lambda folder: True)


def test_the_copy_is_on_a_disk_where_the_gpu_shares_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact.open(made.weights_export("wan", "w4a4"))
    gpu_double(monkeypatch, True, unused=GIB, available=5 * GIB)
    files = WeightFiles(artifact, "transformer", GPU)
    assert copies_of(files) == {False}
    assert files.beside == 0
    name = next(iter(files.tensors))
    kept = files.tensor(name)
    files.close()
    # The CPU runs from the copy itself, and a card has memory of its own.
    for device, integrated in ((CPU, True), (GPU, False)):
        gpu_double(monkeypatch, integrated, unused=GIB, available=5 * GIB)
        del files
        gc.collect()
        files = WeightFiles(artifact, "transformer", device)
        assert copies_of(files) == {True}
        assert files.beside == 0
        assert torch.equal(files.tensor(name), kept)


def test_without_a_disk_it_is_in_memory_and_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = Artifact.open(made.weights_export("wan", "w4a4"))
    gpu_double(monkeypatch, True, unused=GIB, available=5 * GIB)
    no_disk(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="dvdquant"):
        files = WeightFiles(artifact, "transformer", GPU)
    assert copies_of(files) == {True}
    assert files.beside == files.nbytes > 0
    assert "set TMPDIR to a folder on a disk" in caplog.text
    files.close()
    assert files.beside == 0


def test_a_disk_is_one_that_has_room_and_is_no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(private_copy, "memory_limit", lambda: 1 << 50)
    device = tmp_path.stat().st_dev
    monkeypatch.setattr(mounts, "mounts_of", lambda number: [("ext4", "/dev/sda1 rw")] if number == device else [])
    assert not fits_in_memory(1000, shared=True)
    assert fits_in_memory(1000)
    assert bytes_beside(1000) == 0
    # A folder that is memory, as /tmp often is.
    monkeypatch.setattr(mounts, "mounts_of", lambda number: [("tmpfs", "rw")])
    assert fits_in_memory(1000, shared=True)
    assert bytes_beside(1000) == 1000
    # A disk that is full.
    monkeypatch.setattr(mounts, "mounts_of", lambda number: [])
    monkeypatch.setattr(private_copy, "free_bytes", lambda folder: 999)
    assert fits_in_memory(1000, shared=True)
    assert bytes_beside(1000) == 1000
    assert bytes_beside(999) == 0


class _Opened(Exception):
    """Ends a session when it opens its weight files."""


def take_a_weight(artifact: Artifact, device: torch.device) -> None:
    """Do what a session of engines does for their first input; the rest of it needs a GPU."""
    session = object.__new__(engines.TensorRTSession)
    session.__dict__.update(artifact=artifact, component="transformer", device=device, _files=None, _on_device={})
    session._lora_inputs = engines.LoraInputs(artifact, "transformer")
    session._weight("a weight")


@pytest.mark.parametrize(
    ("module", "opening"), [(pytorch, PyTorchSession), (onnxruntime, OnnxRuntimeSession), (engines, take_a_weight)]
)
def test_every_session_says_where_its_weights_go(module: Any, opening: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session for a GPU opens its files for that GPU, before anything is on it."""
    asked: list[Any] = []

    def opened(artifact: Artifact, component: str, device: torch.device) -> WeightFiles:
        asked.append(device)
        raise _Opened

    monkeypatch.setattr(module, "WeightFiles", opened)
    monkeypatch.setattr(pytorch, "usable_kernels", lambda device: double(87))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    gpu_double(monkeypatch, True, unused=GIB, available=5 * GIB)
    artifact = Artifact.open(made.weights_export("wan", "w4a4"))
    with pytest.raises(_Opened):
        opening(artifact, device=GPU)
    assert asked == [GPU]


@pytest.mark.parametrize("form", ["packed", "expanded"])
def test_the_copy_is_closed_when_the_device_has_made_all(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights need it for the first pass, expanded ones until every width has run; passes go on all the same."""
    artifact = Artifact.open(made.weights_export("wan", "w4a4"))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    monkeypatch.setattr(pytorch, "usable_kernels", lambda device: double(80))
    opened = watch_weight_files(monkeypatch, pytorch)
    with PyTorchSession(artifact, weights=form) as session:
        (files,) = opened
        assert files.nbytes > 0
        counted, start = held_weights(artifact.plan(), 80, (4, 8), artifact.sizes), session.resident_bytes()["weights"]
        planned = counted.packed if form == "packed" else counted.expanded
        assert claimed_bytes(CPU) == planned > 0
        eight = session.run(inputs, 8)
        made_now = session.resident_bytes()["weights"] - start
        assert claimed_bytes(CPU) == (0 if form == "packed" else planned - made_now) < planned
        assert (files.nbytes > 0) == (form == "expanded")
        four = session.run(inputs, 4)
        assert files.nbytes == 0
        assert claimed_bytes(CPU) == 0
        assert torch.equal(session.run(inputs, 8), eight)
        assert torch.equal(session.run(inputs, 4), four)
        layers = quant_linears(session.model).values()
        made_by_kernels = [layer.kernel for layer in layers if layer.kernel is not None]
        assert made_by_kernels
        for kernel in made_by_kernels if form == "expanded" else ():
            with pytest.raises(UnsupportedError, match="only as its kernels multiply it"):
                _ = kernel.packed


@pytest.mark.parametrize("form", ["packed", "expanded"])
def test_a_layer_lets_all_stored_tensors_go(form: Any) -> None:
    layer = small_layer(smoothed=True)
    stored = [layer.get_buffer(name) for name in ("weight", "weight_scale", "pre_quant_scale", "pre_quant_shift")]
    where = {tensor.data_ptr() for tensor in stored}
    # On the CPU the codes of a packed weight are the stored ones themselves.
    seen = [weakref.ref(tensor) for tensor in stored[1 if form == "packed" else 0 : 2]]
    del stored
    layer.prepare(double(90), [ActivationSpec(8), ActivationSpec(4)], torch.bfloat16, CPU, form)
    assert layer.kernel is not None
    layer.kernel.forget_stored()  # too early: nothing is made, and nothing goes
    first = layer(tokens())
    if form == "expanded":
        layer.kernel.make_weight(4, 0)
    layer.kernel.forget_stored()
    gc.collect()
    assert all(each() is None for each in seen)
    held = [value for value in vars(layer.kernel).values() if isinstance(value, tuple)]
    assert not {t.data_ptr() for each in held for t in each if isinstance(t, torch.Tensor)} & where
    assert torch.equal(layer(tokens()), first)


def test_the_plan_counts_a_copy_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Jetson without a disk for it: as large as the weight files, beside the transformer. Nowhere else."""
    out, pipeline = wan_pipeline()
    checker = open_checker(Artifact.open(out), pipeline=pipeline)
    request = checker.check(GenerateRequest("a red cat", steps=2, mode="a8"))
    files = sum(entry["bytes"] for name, entry in checker.artifact.manifest.files.items() if "transformer.s" in name)
    on_disk = run_bytes(checker, [request], "pytorch", 0, narrow=False, shared=True)
    assert on_disk.copy == 0
    no_disk(monkeypatch)
    assert run_bytes(checker, [request], "pytorch", 0, narrow=False).copy == 0
    in_memory = run_bytes(checker, [request], "pytorch", 0, narrow=False, shared=True)
    assert in_memory.copy >= files > 0
    for alternate in (False, True):
        before, after = (arrange(run, Arrangement(PACKED, alternate=alternate)) for run in (on_disk, in_memory))
        added = [b.total - a.total for a, b in zip(before.stages, after.stages)]
        assert added == [0 if alternate else in_memory.copy, in_memory.copy, in_memory.copy]
        assert after.stages[1].parts["copy of the weight files"] == in_memory.copy


def test_the_command_says_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    out, pipeline = wan_pipeline()
    words = (out, "--pipeline", pipeline, "--prompt", "a red cat", "--device", "cpu", "--backend", "pytorch")
    monkeypatch.setattr(
        run_memory, "place_of", lambda device: run_memory.Place("Orin", 7 * GIB, 5 * GIB, True, 0, "8.7")
    )
    assert "copy of the weight files" not in drawn(*words, "--dry-run")
    no_disk(monkeypatch)
    assert "copy of the weight files" in drawn(*words, "--dry-run")
