"""Engine sessions: the choice of engine, nothing deserialized unchecked, binding on a double, and real engines on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dvdquant.artifact.manifest import Manifest
from dvdquant.backends import Backend, load_backend
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import engine_choice, engines, open_session
from dvdquant.deploy.sessions.engine_binding import EngineLog, Lane
from dvdquant.deploy.sessions.engine_choice import FoundEngines
from dvdquant.deploy.sessions.engines import TensorRTSession, deserialize, make_runtime, select_engine
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.deploy.sessions.weight_form import claimed_bytes
from dvdquant.deploy.switching.controller import StepController
from dvdquant.deploy.switching.runner import StepRunner
from dvdquant.errors import DvdquantError, EngineError, UnsupportedError
from dvdquant.export.verify.graph import ATOL, FACTOR
from dvdquant.model import weight_choice
from dvdquant.model.held_weights import held_weights
from dvdquant.model.weight_choice import choose_weights, expand_named
from tests.support import session_exports as made
from tests.support.engine_double import BF16, HOST, DoubleContext, DoubleEngine, Library


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return Artifact.open(made.engine_export())


@pytest.fixture
def sample(artifact: Artifact) -> dict[str, Tensor]:
    return artifact.family().sample(artifact.sizes, artifact.dtype)


def on_the_host(monkeypatch: pytest.MonkeyPatch, library: Library, sm: str = "8.9") -> None:
    """Let sessions take the double for the library, and the host for a GPU of that SM."""
    monkeypatch.setattr(engine_choice, "device_sm", lambda device: sm)
    monkeypatch.setattr(engine_choice, "load_backend", lambda name: library.backend)


# ------------------------------------------------------------------------------- before anything is deserialized (real)


def test_the_real_library_and_the_real_engine(artifact: Artifact) -> None:
    """All of the way on the real manifest, file and library, up to where a driver is needed."""
    library = load_backend("rtx")
    for bits in artifact.bits():
        entry = select_engine(artifact, "transformer_2", library, bits, "8.9")
        assert entry["path"] == f"engines/rtx-sm89/transformer_2_a{bits}.engine"
        log = EngineLog()
        runtime = make_runtime(library, log)
        if torch.cuda.is_available():
            continue
        with pytest.raises(EngineError) as caught:
            deserialize(artifact, entry, library, runtime, log)
        assert "CUDA driver" in caught.value.what
        assert "driver" in (caught.value.fix or "")


def test_no_gpu(artifact: Artifact) -> None:
    with pytest.raises(EngineError, match=r"engines run on CUDA devices, not on cpu(?s:.*)--backend onnxruntime"):
        open_session(artifact, backend="rtx", device="cpu")


def change_engines(**changes: Any) -> Callable[[Manifest], Manifest]:
    def edit(manifest: Manifest) -> Manifest:
        return dataclasses.replace(manifest, engines=tuple({**e, **changes} for e in manifest.engines))  # type: ignore[typeddict-item]

    return edit


def _mismatches() -> dict[str, tuple[str, Callable[[Manifest], Manifest], str]]:
    """name -> (SM of the GPU, what is done to the manifest, text of the message)."""
    same: Callable[[Manifest], Manifest] = lambda manifest: manifest  # noqa: E731
    cases: dict[str, tuple[str, Callable[[Manifest], Manifest], str]] = {}
    for sm in ("5.0", "6.1", "7.0", "7.5", "8.0", "8.6", "8.7", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"):
        cases[f"GPU of SM {sm}"] = (sm, same, f"this GPU, which has SM {sm}")
    for sms in ([], ["8.90"], ["89"], ["8"], ["9"], ["8.0", "8.6"], ["12.0"], ["sm_89"], ["8.9 "]):
        cases[f"engine for {sms}"] = ("8.9", change_engines(sm=sms), "this GPU, which has SM 8.9")
    for version in ("1.7.1", "1.7.1.115", "1.7.1.117", "1.8.0.1", "2.0.0", "1.6.0.0", "", "1.7.1.116 ", "v1.7.1.116"):
        edit = change_engines(versions={"tensorrt_rtx": version})
        cases[f"built by {version!r}"] = ("8.9", edit, "loads in that release only")
    for versions in ({}, {"tensorrt": "1.7.1.116"}, {"rtx": "1.7.1.116"}):
        cases[f"versions {versions}"] = ("8.9", change_engines(versions=versions), "loads in that release only")
    for index in range(6):
        digest = f"{index}" * 64
        cases[f"of graph {digest[:2]}"] = ("8.9", change_engines(onnx_sha256=digest), "built from another graph")
    sizes = {"frames": [2, 3, 4], "height": [4, 8, 12], "width": [6, 8, 10], "text_tokens": 12, "batch": 1}
    for name, value in (
        ("frames", [2, 3, 5]),
        ("height", [4, 4, 4]),
        ("width", [6, 8]),
        ("text_tokens", 13),
        ("batch", 2),
    ):
        edit = change_engines(shapes={**sizes, name: value})
        cases[f"for {name} {value}"] = ("8.9", edit, "built for other sizes")
    cases["without sizes"] = ("8.9", change_engines(shapes={}), "built for other sizes")
    cases["of a plugin"] = ("8.9", change_engines(precision="plugin"), "needs a plugin")
    cases["of TensorRT"] = ("8.9", change_engines(backend="tensorrt"), "no tensorrt_rtx engine of transformer a4")
    cases["of 8 bits only"] = ("8.9", change_engines(act_bits=8), "no tensorrt_rtx engine of transformer a4")
    renamed = change_engines(path="engines/rtx-sm89/transformer_2_a4.engine")
    cases["of the other transformer"] = ("8.9", renamed, "no tensorrt_rtx engine of transformer a4")
    cases["none"] = ("8.9", lambda m: dataclasses.replace(m, engines=()), "no tensorrt_rtx engine of transformer a4")
    return cases


MISMATCHES = _mismatches()


def test_mismatches_never_reach_the_library(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong SM, release, graph, sizes or kind: an error with a way out, and no byte of an engine is read."""
    assert len(MISMATCHES) >= 50
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"])
    read: list[str] = []
    monkeypatch.setattr(Artifact, "read", lambda self, name: read.append(name))
    for kind, (sm, edit, text) in MISMATCHES.items():
        with monkeypatch.context() as patched:
            on_the_host(patched, library, sm)
            other = Artifact(artifact.root, edit(artifact.manifest), artifact.configs)
            with pytest.raises(EngineError) as caught:
                TensorRTSession(other, device=HOST)
        assert text in str(caught.value), kind
        assert caught.value.fix, kind
        assert "dvdq-export" in caught.value.fix or "backend" in caught.value.fix, kind
    assert (library.deserialized, read) == ([], [])


def test_a_foreign_engine_is_not_looked_at(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine file that the manifest does not list, for just this GPU."""
    out = made.copy_of(artifact.root, tmp_path / "out")
    (out / "engines/rtx-sm120").mkdir()
    for path in (out / "engines/rtx-sm89").iterdir():
        shutil.copy(path, out / "engines/rtx-sm120" / path.name)
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"])
    on_the_host(monkeypatch, library, "12.0")
    with pytest.raises(EngineError, match=r"this GPU, which has SM 12.0(?s:.*)--sm 12.0"):
        TensorRTSession(Artifact.open(out), device=HOST)
    assert library.deserialized == []


@pytest.mark.parametrize("how", ["missing", "cut", "flipped", "swapped", "linked"])
def test_a_damaged_engine_is_not_deserialized(
    how: str, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made.copy_of(artifact.root, tmp_path / "out")
    engine, other = (out / f"engines/rtx-sm89/transformer_a{bits}.engine" for bits in (4, 8))
    raw = engine.read_bytes()
    engine.unlink()
    if how == "swapped":
        engine.write_bytes(other.read_bytes())
    elif how == "linked":
        engine.symlink_to(artifact.root / "engines/rtx-sm89/transformer_a4.engine")
    elif how != "missing":
        engine.write_bytes(raw[:-1] if how == "cut" else raw[:50] + bytes([raw[50] ^ 1]) + raw[51:])
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"])
    on_the_host(monkeypatch, library)
    with pytest.raises(EngineError, match=r"transformer_a4.engine(?s:.*)build it again: dvdq-export"):
        TensorRTSession(Artifact.open(out), device=HOST)
    assert library.deserialized == []


def test_the_librarys_own_verdict(artifact: Artifact) -> None:
    """What the header check finds becomes words and a way out, before deserializing."""
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"])
    kinds = library.module.EngineInvalidityDiagnostics
    entry = select_engine(artifact, "transformer", library.backend, 4, "8.9")
    for kind, fix in (
        (kinds.VERSION_MISMATCH, "build it again"),
        (kinds.UNSUPPORTED_CC, "build it again"),
        (kinds.OLD_CUDA_DRIVER, "driver"),
        (kinds.INSUFFICIENT_GPU_MEMORY, "free GPU memory"),
    ):
        log = EngineLog()
        runtime = make_runtime(library.backend, log)
        runtime.get_engine_validity = lambda header, kind=kind: (library.module.EngineValidity.INVALID, int(kind.value))
        with pytest.raises(EngineError) as caught:
            deserialize(artifact, entry, library.backend, runtime, log)
        assert kind.name in caught.value.what
        assert fix in (caught.value.fix or "")
    assert library.deserialized == []


def test_sm_that_the_library_cannot_build_for(artifact: Artifact) -> None:
    with pytest.raises(EngineError) as caught:
        select_engine(artifact, "transformer", load_backend("rtx"), 4, "9.0")
    assert "dvdq-export" not in (caught.value.fix or "")
    assert "use the tensorrt, pytorch or onnxruntime backend" in (caught.value.fix or "")
    tensorrt = Backend("tensorrt", None, "11.4")
    with pytest.raises(
        EngineError, match=r"no tensorrt engine(?s:.*)--target tensorrt --plugin PLUGIN_LIBRARY --sm 9.0"
    ):
        select_engine(artifact, "transformer", tensorrt, 4, "9.0")


# ---------------------------------------------------------------------------------------------------- binding (double)


@pytest.fixture
def pytorch(artifact: Artifact) -> Iterator[PyTorchSession]:
    with PyTorchSession(artifact) as session:
        yield session


def compute_by(session: PyTorchSession, artifact: Artifact) -> Callable[[dict[str, Tensor], str], Tensor]:
    """What the engine with that hash would compute."""
    bits = {artifact.manifest.files[e["path"]]["sha256"]: e["act_bits"] for e in artifact.manifest.engines}

    def compute(inputs: dict[str, Tensor], name: str) -> Tensor:
        names = [spec.name for spec in session.family.inputs(session.sizes)]
        return session.run({n: inputs[n] for n in names}, bits[name])

    return compute


@pytest.mark.parametrize("library_graphs", [False, True])
def test_binding(
    library_graphs: bool, artifact: Artifact, pytorch: PyTorchSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through addresses, the double gives what the PyTorch session gives, for every size and bit-width."""
    library = Library(BF16, compute_by(pytorch, artifact))
    on_the_host(monkeypatch, library)
    with TensorRTSession(artifact, device=HOST, cuda_graphs=library_graphs) as session:
        engines_read = [e["path"] for e in artifact.manifest.engines if "transformer_a" in e["path"]]
        assert library.deserialized == [artifact.manifest.files[path]["sha256"] for path in engines_read]
        strategy = library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        assert [c for c in library.calls if c[0] == "graphs"] == [("graphs", strategy)] * (2 * library_graphs)
        for which in ("opt", "opt", "max", "min"):
            inputs = artifact.family().sample(artifact.sizes, torch.float32, 3, which)
            for bits in (4, 8):
                y = session.run(inputs, bits)
                assert torch.equal(y, pytorch.run(inputs, bits))
                assert (y.dtype, y.shape) == (torch.bfloat16, inputs["hidden_states"].shape)
        sizes = artifact.manifest.files
        assert session.resident_bytes() == {
            "weights": 0,
            "engines": sum(sizes[path]["bytes"] for path in engines_read),
            "workspace": 1000,
        }
        # One scratch for both contexts.
        assert len(set(library.scratch)) == 1
    assert session.resident_bytes() == {"weights": 0, "engines": 0, "workspace": 0}


@pytest.mark.parametrize(
    ("recipe", "kernels", "asked", "warned"),
    [
        ("16", {}, "int8", True),
        ("16", {}, "16", False),
        ("16", {}, None, False),
        ("fp8", {"FP8": 2}, "fp8", False),
        ("fp8", {"FP8": 2}, "16", True),
        ("fp8", {"BFloat16": 2}, "fp8", True),
        ("int8", {"FP8": 2}, "int8", True),
        ("int8", {"FP8": 2}, None, False),
        ("fp8", {}, "fp8", True),
    ],
)
def test_an_attention_that_engines_do_not_have_is_named(
    recipe: str, kernels: dict[str, int], asked: str | None, warned: bool,
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """What was asked for and is not there leads to a warning that says what the engines run; the recipe's to none."""
    on_the_host(monkeypatch, Library(BF16, lambda inputs, name: inputs["hidden_states"]))
    manifest = change_engines(attention=kernels, executes="tensor cores of this kind")(artifact.manifest)
    manifest = dataclasses.replace(manifest, recipe={**manifest.recipe, "attention": recipe})
    other = Artifact(artifact.root, manifest, artifact.configs)
    with open_session(other, backend="rtx", device="cpu", bits=[4], attention=asked) as session:
        assert session.backend == "tensorrt_rtx"
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == warned
    if warned:
        assert f"{asked} is for PyTorch sessions: a4: tensor cores of this kind" in said[0]


def test_shapes_are_told_when_they_change(
    artifact: Artifact, sample: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"])
    on_the_host(monkeypatch, library)
    larger = artifact.family().sample(artifact.sizes, artifact.dtype, 0, "max")
    with TensorRTSession(artifact, device=HOST) as session:
        for inputs, told in ((sample, 3), (sample, 0), (larger, 3), (larger, 0), (sample, 3)):
            library.calls.clear()
            session.run(inputs, 4)
            assert sum(call[0] == "shape" for call in library.calls) == told


def test_growing_scratch_is_given_to_both_contexts(
    artifact: Artifact, sample: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"], memory=1000)
    on_the_host(monkeypatch, library)
    larger = artifact.family().sample(artifact.sizes, artifact.dtype, 0, "max")
    with TensorRTSession(artifact, device=HOST) as session:
        session.run(sample, 4)
        session.run(sample, 8)
        library.memory = 5000
        session.run(larger, 8)
        # a4 has not been told since; its next pass must not use memory that was given back.
        library.memory = 1000
        session.run(sample, 4)
        executed = [call[2] for call in library.calls if call[0] == "execute"]
        assert [size for _, size in executed] == [1000, 1000, 5000, 5000]
        assert executed[2] == executed[3]
        assert session.resident_bytes()["workspace"] == 5000


def test_packed_weights_as_inputs(
    artifact: Artifact, sample: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that takes weights as inputs gets the stored bytes, the same memory at every bit-width."""
    layer = "blocks.0.ffn.net.2"
    spec = next(s for s in artifact.plan("transformer_2").layers if s.name == layer)
    tensors = {**BF16}
    for name, (dtype, shape) in spec.tensors().items():
        # TensorRT passes no UINT8 to plugins: the factors' bytes are INT8 in the engine.
        kind = {torch.int8: "INT8", torch.uint8: "INT8", torch.float32: "FLOAT"}[dtype]
        tensors[name] = (kind, shape, False)
    seen: list[dict[str, Tensor]] = []

    def compute(inputs: dict[str, Tensor], name: str) -> Tensor:
        seen.append({n: t for n, t in inputs.items() if n.startswith("blocks.")})
        return inputs["hidden_states"]

    library = Library(tensors, compute)
    on_the_host(monkeypatch, library)
    model = made.quantized_model(artifact, "transformer_2", 4)
    with TensorRTSession(artifact, "transformer_2", device=HOST) as session:
        for bits in (4, 8):
            session.run(sample, bits)
        assert session.resident_bytes()["weights"] == sum(t.nbytes for t in seen[0].values())
    module = model.get_submodule(layer)
    for found in seen:
        assert set(found) == set(spec.tensors())
        for name, value in found.items():
            assert torch.equal(value, getattr(module, name.removeprefix(layer + ".")).view(value.dtype))


def test_how_the_plugin_holds_weights(
    artifact: Artifact, sample: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The form reaches the plugin where contexts are made, and nowhere else; what it holds is counted."""
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"])
    on_the_host(monkeypatch, library)
    monkeypatch.setattr(engines, "device_sm", lambda device: "8.9")
    with pytest.raises(UnsupportedError, match="hold their weights as they were built, not packed"):
        TensorRTSession(artifact, device=HOST, weights="packed")
    find = engines.find_engines

    def as_plugin(*arguments: Any) -> FoundEngines:
        found = find(*arguments)
        return found._replace(entries={b: {**e, "precision": "plugin"} for b, e in found.entries.items()})  # type: ignore[misc]

    monkeypatch.setattr(engines, "find_engines", as_plugin)
    told: list[str | None] = []
    make = DoubleEngine.create_execution_context

    def context(self: DoubleEngine, how: Any) -> Any:
        told.append(os.environ.get("DVDQUANT_WEIGHTS"))
        return make(self, how)

    monkeypatch.setattr(DoubleEngine, "create_execution_context", context)
    held = held_weights(artifact.plan("transformer"), 89, (4, 8), artifact.sizes)
    # So few tokens, that the count says expanded; the user's own word comes before it.
    for asked, variable, form in (
        ("auto", None, "expanded"), ("auto", "packed", "packed"), ("packed", None, "packed"), ("expanded", "packed", "expanded"),
    ):  # fmt: skip
        monkeypatch.delenv("DVDQUANT_WEIGHTS", raising=False)
        if variable is not None:
            monkeypatch.setenv("DVDQUANT_WEIGHTS", variable)
        told.clear()
        with TensorRTSession(artifact, device=HOST, weights=asked) as session:  # type: ignore[arg-type]
            assert session.weights == form
            assert told == [form, form]
            beside = choose_weights(held, form, plugin=True).beside  # type: ignore[arg-type]
            assert session.resident_bytes()["weights"] == beside
            # The plugin makes it in the first passes: until then it looks free to a session that is opened.
            assert claimed_bytes(HOST) == beside
            for bits in (8, 4):
                assert claimed_bytes(HOST) == beside
                session.run(sample, bits)
            assert claimed_bytes(HOST) == 0
        assert os.environ.get("DVDQUANT_WEIGHTS") == variable
        assert session.resident_bytes()["weights"] == 0
    # Some layers so and some so: the plugin is told the names of those that are expanded.
    monkeypatch.setattr(weight_choice, "COST_LIMIT", held.cost / 2)
    choice = choose_weights(held, "auto", plugin=True)
    monkeypatch.delenv("DVDQUANT_WEIGHTS", raising=False)
    told.clear()
    with TensorRTSession(artifact, device=HOST) as session:
        assert (session.weights, told[0]) == ("mixed", "mixed:" + ",".join(sorted(choice.expanded)))
        assert session.resident_bytes()["weights"] == choice.beside
    assert "DVDQUANT_WEIGHTS" not in os.environ
    # The names may come from the user, as the plugin takes them; the session is told its own word before that.
    for names in (sorted(choice.expanded)[:2], []):
        variable = "mixed:" + ",".join([*names, "no.such.layer"])
        monkeypatch.setenv("DVDQUANT_WEIGHTS", variable)
        told.clear()
        caplog.clear()
        with TensorRTSession(artifact, device=HOST) as session:
            wanted = expand_named(held, names, plugin=True)
            assert session.weights == wanted.form == ("mixed" if names else "packed")
            assert told == 2 * ["mixed:" + ",".join(names) if names else "packed"]
            assert session.resident_bytes()["weights"] == wanted.beside
        assert os.environ["DVDQUANT_WEIGHTS"] == variable
        assert "no quantized layer is named no.such.layer" in caplog.text
        with TensorRTSession(artifact, device=HOST, weights="expanded") as session:
            assert session.weights == "expanded"
    monkeypatch.setenv("DVDQUANT_WEIGHTS", "thin")
    with pytest.raises(UnsupportedError, match="unknown weights 'thin'"):
        TensorRTSession(artifact, device=HOST)


def test_engines_that_do_not_fit_the_graph(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that are no graph's, a weight of another shape, a missing input, a type torch lacks."""
    lacking = {name: value for name, value in BF16.items() if name != "timestep"}
    for tensors, text in (
        ({**BF16, "guidance": ("FLOAT", (1,), False)}, "no tensor 'guidance'"),
        ({**BF16, "blocks.0.ffn.net.2.bias": ("FLOAT", (7,), False)}, r"wants blocks.0.ffn.net.2.bias as"),
        (lacking, "lacks the inputs timestep"),
        ({**BF16, "sample": ("FP4", (1,), True)}, "a tensor of type FP4"),
    ):
        library = Library(tensors, lambda inputs, name: inputs["hidden_states"])
        with monkeypatch.context() as patched:
            on_the_host(patched, library)
            with pytest.raises(DvdquantError, match=text):
                TensorRTSession(artifact, device=HOST)


@pytest.mark.parametrize(
    ("stage", "text"), [("deserialize", "no room for the engine"), ("context", "no execution context")]
)
def test_failures_while_loading(stage: str, text: str, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"])
    library.fail = stage
    on_the_host(monkeypatch, library)
    with pytest.raises(EngineError, match=text):
        TensorRTSession(artifact, device=HOST)


def test_failures_while_running(artifact: Artifact, sample: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"])
    on_the_host(monkeypatch, library)
    with TensorRTSession(artifact, device=HOST) as session:
        library.fail = "execute"
        with pytest.raises(EngineError, match="the engine failed: an illegal access"):
            session.run(sample, 4)
        library.fail = None
        assert torch.equal(session.run(sample, 4), sample["hidden_states"])


@pytest.mark.parametrize(
    "says",
    ["Error Code 2: OutOfMemory (Requested size was 2147483648 bytes.)", "Error Code 1: Cuda Runtime (out of memory)"],
)
def test_an_engine_without_memory_is_told_as_such(
    says: str, artifact: Artifact, sample: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The low engine's step runs again; of the high one the caller reads what helps; the next failure is another one."""
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"])
    on_the_host(monkeypatch, library)
    with TensorRTSession(artifact, device=HOST) as session:
        runner = StepRunner(session, StepController("fixed", bits=4))
        library.fail, library.says = "execute", says
        with pytest.raises(EngineError, match="running out of memory on the 8-bit engine: the engine") as caught:
            runner.run(sample, step=0)
        assert says in caught.value.what
        assert "retry after running out of memory on the 4-bit engine" in caught.value.what
        assert "smaller size" in str(caught.value.fix)
        library.says = "an illegal access"
        runner.begin_request()
        with pytest.raises(EngineError, match="EngineError on the 8-bit engine") as caught:
            runner.run(sample, step=0)
        assert "memory" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [None, RuntimeError("the capture was invalidated"), torch.OutOfMemoryError("CUDA out of memory")], ids=str
)
def test_engines_that_cannot_be_captured_run_as_usual(
    error: Exception | None,
    artifact: Artifact,
    sample: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As steps of PyTorch sessions, with the same capture; the log says so once."""
    library = Library(BF16, lambda inputs, name: inputs["hidden_states"])
    on_the_host(monkeypatch, library)
    captured: list[Any] = []

    def capture(step: Any, inputs: Any, device: torch.device, stream: Any) -> Any:
        captured.append(stream)
        if error is not None:
            raise error
        output = step(inputs)
        return output, lambda: output.copy_(step(inputs))

    lane = lane_of(Device(monkeypatch), monkeypatch)
    with TensorRTSession(artifact, device=HOST, cuda_graphs=True) as session:
        monkeypatch.setattr(engines, "capture_step", capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(Backend, "takes_plugins", True)
        for factor in (1, 2, 3):
            given = {**sample, "hidden_states": factor * sample["hidden_states"]}
            for bits in (4, 8):
                assert torch.equal(session.run(given, bits), given["hidden_states"])
        assert captured == [lane.own] * (2 if error is None else 1)
        assert caplog.text.count("not captured as CUDA graphs") == int(error is not None)
        if error is not None:
            assert str(error) in caplog.text
        # What is no fault of the capture is an error of the pass.
        library.fail = "execute"
        with pytest.raises(EngineError, match="the engine failed: an illegal access"):
            session.run(sample, 4)


# ---------------------------------------------------------------------------------------------- order of streams (double)


class Device:
    """What is queued on the streams of a device, and what must be over before each of it begins.

    ``order`` has (what, stream, what is over by then) of every operation, by number. PyTorch's operators count as queued on
    the current stream, as they are on a GPU.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.order: list[tuple[str, int, frozenset[int]]] = []
        self.streams = {0: DeviceStream(self, 0)}
        self.current = self.streams[0]
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "stream", self.use)

    def stream(self) -> DeviceStream:
        made_one = self.streams[len(self.streams)] = DeviceStream(self, len(self.streams))
        return made_one

    def forget(self) -> None:
        """Begin with nothing queued."""
        self.order.clear()
        for stream in self.streams.values():
            stream.seen.clear()

    @contextlib.contextmanager
    def use(self, stream: DeviceStream) -> Iterator[None]:
        before = self.current
        self.current = stream
        try:
            yield
        finally:
            self.current = before

    def queue(self, what: str, stream: DeviceStream | None = None) -> int:
        stream = stream or self.current
        self.order.append((what, stream.cuda_stream, frozenset(stream.seen)))
        stream.seen.add(len(self.order) - 1)
        return len(self.order) - 1


class DeviceStream:
    """The part of ``torch.cuda.Stream`` that orders."""

    def __init__(self, device: Device, handle: int) -> None:
        self.device, self.cuda_stream = device, handle
        self.seen: set[int] = set()

    def wait_stream(self, other: DeviceStream) -> None:
        self.seen |= other.seen

    def wait_event(self, event: DeviceEvent) -> None:
        self.seen |= event.seen


class DeviceEvent:
    """Of ``torch.cuda.Event``."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def record(self, stream: DeviceStream) -> None:
        self.seen = set(stream.seen)


def lane_of(device: Device, monkeypatch: pytest.MonkeyPatch) -> Lane:
    """The lane of the sessions to be opened, on streams of the double."""
    lane = Lane(HOST)
    lane.own, lane.done = device.stream(), DeviceEvent()
    monkeypatch.setattr(engines, "Lane", lambda _: lane)
    return lane


class Watch(TorchDispatchMode):
    """Puts the operators that move data into the device's order."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.clone):
            self.device.queue(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("replays", [False, True])
def test_passes_and_what_surrounds_them_are_in_order(
    replays: bool, artifact: Artifact, sample: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From whatever streams a session is called: a pass begins after its inputs and after all of the pass before, which has
    the same scratch and, captured, the same inputs and output; the result is read after the pass."""
    library = Library(
        {**BF16, "sample": ("FLOAT", (1, 4, -1, -1, -1), True)}, lambda inputs, name: inputs["hidden_states"]
    )
    on_the_host(monkeypatch, library)
    device = Device(monkeypatch)
    lane = lane_of(device, monkeypatch)
    session = TensorRTSession(artifact, device=HOST, cuda_graphs=replays)
    execute = DoubleContext.execute_async_v3

    def passing(context: DoubleContext, stream: int) -> bool:
        device.queue("pass", device.streams[stream])
        with (
            torch.utils._python_dispatch._disable_current_modes()
        ):  # what the double computes by is no work of the session
            return execute(context, stream)

    monkeypatch.setattr(DoubleContext, "execute_async_v3", passing)
    if replays:

        def captured(step: Any, inputs: Any, *_: Any) -> Any:
            return step(inputs), lambda: device.queue("pass")

        monkeypatch.setattr(engines, "capture_step", captured)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(Backend, "takes_plugins", True)
    session.run(sample, 4)  # binds shapes and scratch, and captures; nothing of it counts
    device.forget()
    lane.done = DeviceEvent()
    others = [device.stream(), device.stream()]
    with Watch(device):
        for caller in (device.streams[0], others[0], device.streams[0], device.streams[0], others[1], others[0]):
            with device.use(caller):
                first = device.queue("the caller makes the inputs")
                session.run(sample, 4)
                last = device.queue("the caller uses the output")
            whole = range(first, last + 1)
            (run,) = [i for i in whole if device.order[i][0] == "pass"]
            inside = device.order[run][2]
            assert first in inside
            assert set(range(run + 1, last)) <= device.order[last][2]
            for i in range(run + 1, last + 1):
                assert run in device.order[i][2], device.order[i][0]
            # Of the passes before, and of what was read of them: nothing goes on beside this one.
            earlier = [i for i in range(first) if device.order[i][0] not in ("the caller uses the output",)]
            mine = {i for i in earlier if device.order[i][0] == "pass"}
            assert mine <= inside
            if replays:
                # The copies into the captured inputs and out of the captured output, which all passes share.
                shared = {i for i in earlier if device.order[i][0] == "copy_"}
                (before,) = {min(i for i in whole if device.order[i][0] == "copy_")}
                assert shared <= device.order[before][2]
    assert sum(what == "pass" for what, _, _ in device.order) == 6
    assert any(what == "_to_copy" for what, _, _ in device.order)  # the watch sees the cast
    session.close()


# ------------------------------------------------------------------------------------------------------- on a GPU (real)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_real_engines(cuda_graphs: bool) -> None:
    """TensorRT-RTX engines built for this GPU, against float64, with the bound that ONNX Runtime has to keep."""
    sm = engine_choice.device_sm(torch.device("cuda"))
    try:
        load_backend("rtx").compute_capability(sm)
    except DvdquantError as error:
        pytest.skip(f"{error.what}: no TensorRT-RTX engine can be built for this GPU")
    artifact = Artifact.open(made.engine_export(sm))
    with TensorRTSession(artifact, cuda_graphs=cuda_graphs) as session:
        for which in ("opt", "max", "opt"):
            inputs = artifact.family().sample(artifact.sizes, artifact.dtype, 0, which)
            for bits in (4, 8):
                same, exact = made.reference(artifact, "transformer", bits, inputs)
                first, second = (session.run(inputs, bits) for _ in range(2))
                assert torch.equal(first, second)
                assert made.relative(first.cpu(), exact) <= FACTOR * made.relative(same, exact) + ATOL
        assert session.resident_bytes()["workspace"] > 0
