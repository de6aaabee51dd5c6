"""Version-compatible engines: which installed library runs them, what is refused, and that no code out of a file is allowed.

TensorRT and its lean runtime are doubles (tests/support/engine_double.py), which read what the double of the builder writes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.artifact.entries import EngineEntry
from dvdquant.artifact.manifest import load_manifest
from dvdquant.backends import lean_package, load_backend
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.executed import executed_session
from dvdquant.deploy.sessions import best_backend
from dvdquant.deploy.sessions.engines import TensorRTSession, load_plugins
from dvdquant.errors import EngineError
from dvdquant.system.files import hash_file
from tests.support import session_exports as made
from tests.support.device_build import plugin_library
from tests.support.engine_double import BF16, HOST, DoubleContext, DoubleEngine, DoubleTensorRTRuntime, Library
from tests.support.installed_libraries import Machine

RELEASE, NEWER, OLDER, OTHER_MAJOR = "11.4.0.106", "11.5.0.27", "11.3.0.99", "10.13.3.9"
COMPATIBLE = ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"]


def built(
    root: Path, flags: list[str], backend: str = "tensorrt", bits: tuple[int, ...] = (4, 8), **changes: Any
) -> Artifact:
    """An export with an engine of each bit-width, as the double of the builder writes it, and what the manifest says of it."""
    artifact = Artifact.open(made.copy_of(made.weights_export("wan"), root))
    entries = []
    for width in bits:
        path = f"engines/tensorrt-sm87/transformer_a{width}.engine"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps({"version": RELEASE, "flags": flags, "bits": width}))
        graph = artifact.manifest.files[artifact.graph("transformer", width)]["sha256"]
        entry = EngineEntry(
            path=path, backend=backend, sm=["8.7"], act_bits=width, precision="plugin", executes="the plugin",
            onnx_sha256=graph, versions={backend: RELEASE}, shapes=dict(artifact.sizes.to_json()), version_compatible=True,
        )  # fmt: skip
        entries.append({**entry, **changes})
    files = dict(artifact.manifest.files) | {e["path"]: hash_file(root / e["path"]) for e in entries}
    manifest = dataclasses.replace(load_manifest(root), engines=tuple(entries), files=files)
    (root / "manifest.json").write_text(manifest.to_json())
    return Artifact.open(root)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return built(tmp_path_factory.mktemp("lean") / "out", COMPATIBLE)


@pytest.mark.parametrize(
    ("full", "lean", "runs"),
    [
        (RELEASE, None, "tensorrt"),
        (RELEASE, RELEASE, "tensorrt"),
        (NEWER, RELEASE, "tensorrt_lean"),
        (OTHER_MAJOR, RELEASE, "tensorrt_lean"),
        (None, RELEASE, "tensorrt_lean"),
    ],
)
def test_the_library_of_the_release_runs_them(
    full: str | None, lean: str | None, runs: str, artifact: Artifact, monkeypatch: Any, caplog: Any
) -> None:
    """TensorRT itself where it is of the engines' release, and else the lean runtime; one session for both."""
    machine = Machine(monkeypatch, full, lean)
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype, 0, "min")
    with (
        caplog.at_level(logging.INFO, "dvdquant"),
        TensorRTSession(artifact, device=HOST, backend="tensorrt") as session,
    ):
        assert torch.equal(session.run(inputs, 8), inputs["hidden_states"])
        assert machine.deserialized == {runs: 2}
        assert (session.backend, session.library) == ("tensorrt", f"{runs} {RELEASE}")
        assert executed_session(session)["library"] == f"{runs} {RELEASE}"
    assert f"transformer: {runs} {RELEASE} runs the engines" in caplog.text
    assert ("tensorrt_lean" in machine.imported) == (runs == "tensorrt_lean")


def test_auto_takes_them_where_the_lean_runtime_alone_is_installed(artifact: Artifact, monkeypatch: Any) -> None:
    Machine(monkeypatch, None, RELEASE)
    monkeypatch.setattr("dvdquant.deploy.sessions.engines.device_sm", lambda device: "8.7")
    assert best_backend(artifact, "transformer", None, torch.device("cuda"))[0] == "tensorrt"


# The two ways out: the package, and the command.
WAYS_OUT = (f"pip install tensorrt-lean-cu13=={RELEASE}", "dvdq-export", "--version-compatible")


@pytest.mark.parametrize(
    ("full", "lean", "texts"),
    [
        (NEWER, None, [f"tensorrt {NEWER}", "No module named 'tensorrt_lean'"]),
        (None, None, ["No module named 'tensorrt'", "No module named 'tensorrt_lean'"]),
        (NEWER, OLDER, [f"tensorrt {NEWER}", f"tensorrt_lean {OLDER}"]),
        (None, NEWER, ["No module named 'tensorrt'", f"tensorrt_lean {NEWER}"]),
        (OTHER_MAJOR, OTHER_MAJOR, [f"tensorrt {OTHER_MAJOR}", f"tensorrt_lean {OTHER_MAJOR}"]),
    ],
)
def test_no_library_of_the_release(
    full: str | None, lean: str | None, texts: list[str], artifact: Artifact, monkeypatch: Any
) -> None:
    """The error names what was found, what is needed, and how to get it."""
    machine = Machine(monkeypatch, full, lean)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(EngineError) as caught:
        TensorRTSession(artifact, device=HOST, backend="tensorrt")
    assert RELEASE in caught.value.what
    assert "lean runtime" in caught.value.what
    for text in WAYS_OUT:
        assert text in str(caught.value.fix)
    for text in texts:
        assert text in str(caught.value)
    assert machine.deserialized == {}


def _without(*names: str) -> Callable[[EngineEntry], EngineEntry]:
    return lambda entry: {k: v for k, v in entry.items() if k not in names}  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("full", "edit", "text"),
    [
        # Not marked: the lean runtime is not even looked for.
        (NEWER, _without("version_compatible"), "that release only"),
        (None, _without("version_compatible"), "tensorrt cannot be imported"),
        (NEWER, lambda e: {**e, "version_compatible": e["act_bits"] == 4}, "that release only"),
        # Marked, of the right release, and wrong in another way.
        (NEWER, lambda e: {**e, "onnx_sha256": "0" * 64}, "another graph"),
        (NEWER, lambda e: {**e, "shapes": {}}, "other sizes"),
        (NEWER, lambda e: {**e, "sm": ["8.9"]}, "SM 8.7"),
        (NEWER, lambda e: {**e, "versions": {}}, "that release only"),
        # A release that is no version gets into no command line.
        (NEWER, lambda e: {**e, "versions": {"tensorrt": "11.4; rm x"}}, "dvdq-export"),
    ],
)
def test_what_the_lean_runtime_does_not_mend(
    full: str | None, edit: Callable[[Any], Any], text: str, artifact: Artifact, monkeypatch: Any
) -> None:
    """The error names what is wrong, and the one way out: the library itself, or other engines."""
    machine = Machine(monkeypatch, full, RELEASE)
    manifest = dataclasses.replace(artifact.manifest, engines=tuple(map(edit, artifact.manifest.engines)))
    with pytest.raises(EngineError) as caught:
        TensorRTSession(Artifact(artifact.root, manifest, artifact.configs), device=HOST, backend="tensorrt")
    assert text in str(caught.value)
    assert ("install it" if full is None else "dvdq-export") in str(caught.value.fix)
    assert "tensorrt-lean" not in str(caught.value.fix)
    assert "rm x" not in str(caught.value.fix)
    assert machine.deserialized == {}


def test_tensorrt_rtx_has_no_lean_runtime(tmp_path: Path, monkeypatch: Any) -> None:
    """An RTX engine of another release that claims to be version-compatible."""
    artifact = built(tmp_path / "out", COMPATIBLE, backend="tensorrt_rtx", precision="int8")
    machine = Machine(monkeypatch, RELEASE, RELEASE)
    with pytest.raises(EngineError, match=rf"tensorrt_rtx {re.escape(RELEASE)}.*that release only") as caught:
        TensorRTSession(artifact, device=HOST, backend="tensorrt_rtx")
    assert "lean" not in str(caught.value)
    assert (set(machine.imported), machine.deserialized) == ({"tensorrt_rtx"}, {})


@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        # The manifest of a stranger may claim anything of an engine.
        ([], ["stub loadRunner", "version-compatible"]),
        # A runtime inside is code, which would run in this process; the double fails if a session allows it.
        (["VERSION_COMPATIBLE"], ["host code", "engine_host_code_allowed"]),
    ],
)
@pytest.mark.parametrize("full", [None, NEWER])
def test_engines_that_are_not_what_the_manifest_says(
    full: str | None, flags: list[str], texts: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """The error has the library's reason, what the manifest claims, and says to build it again."""
    artifact = built(tmp_path / "out", flags)
    Machine(monkeypatch, full, RELEASE)
    with pytest.raises(EngineError) as caught:
        TensorRTSession(artifact, device=HOST, backend="tensorrt")
    for text in texts:
        assert text in str(caught.value)
    assert "build it again" in str(caught.value.fix)


def test_plugins_are_registered_with_the_library_that_runs_the_engines(
    artifact: Artifact, tmp_path: Path, monkeypatch: Any
) -> None:
    machine = Machine(monkeypatch, NEWER, RELEASE)
    plugin = plugin_library(tmp_path / "good.so", major=11)
    with TensorRTSession(artifact, device=HOST, backend="tensorrt", plugins=[plugin]):
        assert machine.libraries["tensorrt_lean"].plugins == [str(plugin)]
        assert machine.libraries["tensorrt"].plugins == []
    # A process may have loaded TensorRT and a lean runtime of another major version: the plugin cannot tell who calls it.
    lean = machine.libraries["tensorrt_lean"].backend
    with pytest.raises(EngineError, match=r"other\.so") as caught:
        load_plugins(lean, [plugin_library(tmp_path / "other.so", major=10)])
    assert "TensorRT 10" in str(caught.value)
    assert f"tensorrt_lean {RELEASE}" in str(caught.value)
    load_plugins(lean, [plugin_library(tmp_path / "unmarked.so", major=None)])
    assert len(machine.libraries["tensorrt_lean"].plugins) == 2


@pytest.mark.tensorrt_lean
def test_the_real_module_has_what_sessions_use() -> None:
    """Beside TensorRT-RTX in one process. Its runtime is not started: without a driver that may end the process."""
    library, rtx = load_backend("tensorrt_lean"), load_backend("rtx")
    double = Library(BF16, lambda inputs, name: inputs["hidden_states"], name="tensorrt_lean")
    for name in vars(double.module):
        assert hasattr(library.module, name), name
    classes = {
        "Runtime": DoubleTensorRTRuntime,
        "ICudaEngine": DoubleEngine,
        "IExecutionContext": DoubleContext,
    }
    for name, kind in classes.items():
        used = {each for each in vars(kind) if not each.startswith("_")} - {"kind", "create_runtime_config"}
        assert used
        assert used <= set(dir(getattr(library.module, name)))
        assert used <= set(dir(getattr(rtx.module, name)))
    assert (library.takes_plugins, library.builds_for_sms, library.builder) == (True, False, "tensorrt")
    assert not hasattr(library.module, "Builder")


def test_the_package_of_a_release() -> None:
    assert lean_package("11.4.0.106", "13.0") == lean_package("11.4.0.106", None) == "tensorrt-lean-cu13==11.4.0.106"
    assert lean_package("10.3.0", "12.8") == "tensorrt-lean-cu12==10.3.0"
    for release in ("", "11", "11.4; rm x", "11.4\n", "../11.4", "11.4.0.106.1"):
        assert lean_package(release, "13.0") is None
