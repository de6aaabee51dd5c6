"""The repository itself: what the wheel holds, links, dependencies, house rules, and the closing list of skips."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import run_campaign, run_variants
from tests.support.longest_first import LONGEST, longest_first

ROOT = Path(__file__).resolve().parents[1]
_PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, BACKEND = _PYPROJECT["project"], _PYPROJECT["build-system"]["build-backend"]
LINKS = {
    "dvdquant/export": "../export",
    "dvdquant/deploy": "../deploy",
    "dvdquant/_native/kernels": "../../kernels",
    "dvdquant/_native/plugins": "../../plugins",
}
# Distribution → module, where they differ.
MODULES = {
    "nvidia-modelopt": "modelopt",
    "onnx-ir": "onnx_ir",
    "onnxruntime-gpu": "onnxruntime",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "tensorrt-rtx": "tensorrt_rtx",
}
# Imported by diffusers for us: its video writer.
THROUGH_DIFFUSERS = {"imageio"}
BINARY = (".png", ".webp", ".safetensors", ".xz")


def _source_files() -> list[str]:
    """Tracked files and those git would track, relative; symbolic links as themselves."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout: the files of the repository are asked from `git ls-files`")
    return sorted({name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)})


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return _source_files()


@pytest.fixture(scope="module")
def wheel(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the source files, so that no leftover of this checkout can reach it."""
    copy = tmp_path_factory.mktemp("copy")
    for name in sources:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    # Stands for the CUDA and C++ sources, which must ride along as data.
    (copy / "kernels" / "csrc").mkdir(exist_ok=True)
    (copy / "kernels" / "csrc" / "probe.cu").write_text("// probe\n")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (copy / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked by pip into a folder of its own, without dependencies."""
    target = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    done = subprocess.run([*command, "--target", str(target), str(wheel)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


# ---------------------------------------------------------------------------------------------------------- the wheel


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, sources: list[str]) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"dvdquant", f"dvdquant-{PROJECT['version']}.dist-info"}
    folders = [n for n in sources if n.startswith("dvdquant/")]
    folders += [f"dvdquant/{n}" for n in sources if n.startswith(("export/", "deploy/"))]
    # The build script and the device checks ride along with the sources they are for.
    folders += [f"dvdquant/_native/{n}" for n in sources if n.startswith("kernels/")]
    # The folder that ComfyUI takes is no package; its nodes are in dvdquant.deploy.comfyui.
    folders = [n for n in folders if not n.startswith("dvdquant/deploy/comfyui-dvdquant/")]
    expected = {name for name in folders if name.endswith((".py", "py.typed"))}
    assert {n for n in names if n.endswith((".py", "py.typed"))} == expected
    assert {"dvdquant/export/pipeline.py", "dvdquant/export/passes/__init__.py", "dvdquant/py.typed"} <= names
    assert {"dvdquant/deploy/__init__.py", "dvdquant/deploy/report/templates/report.html.j2"} <= names
    assert "dvdquant/_native/kernels/csrc/probe.cu" in names


@pytest.mark.parametrize("host", ["", "aarch64"])
def test_wheel_takes_the_built_kernels_along(wheel: Path, host: str) -> None:
    """Where ``make kernels`` has built them; the package looks for them in that place."""
    copy = wheel.parents[1]
    folder = copy / "build" / ("kernels-aarch64" if host else "kernels")
    folder.mkdir(parents=True)
    (folder / "libdvdquant_kernels.so").write_bytes(b"a library")
    # The backend that pyproject.toml names, without the processes that ask it for its requirements first.
    (copy / f"dist-{host}").mkdir()
    command = [sys.executable, "-c", f"from {BACKEND} import build_wheel; build_wheel({f'dist-{host}'!r})"]
    environment = os.environ | {"DVDQUANT_HOST": host}
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (copy / f"dist-{host}").glob("*.whl")
    assert zipfile.ZipFile(path).read("dvdquant/_native/libdvdquant_kernels.so") == b"a library"
    platform = "linux_aarch64" if host else sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert path.name == f"dvdquant-{PROJECT['version']}-py3-none-{platform}.whl"
    assert wheel.name == f"dvdquant-{PROJECT['version']}-py3-none-any.whl"


def test_messages_advise_packages_that_are_declared(sources: list[str]) -> None:
    """A name in `pip install` is a dependency of ours, or one of our extras."""
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *(each for extra in extras.values() for each in extra)]
    declared = {re.split(r"[<>=!~ ;\[]", each, maxsplit=1)[0].lower() for each in requirements}
    wrong = []
    for name in _python_files(sources):
        if not name.startswith(("dvdquant/", "export/", "deploy/")):
            continue
        for words in re.findall(r"pip install ([^\"\n`(]+)", (ROOT / name).read_text()):
            for word in re.split(r"[\s,]+", words.replace("'", " ")):
                if word.isupper() or word.endswith(".txt"):
                    continue  # a place that the reader fills in, or a list of requirements
                plain = re.split(r"[<>=!~]", word, maxsplit=1)[0].lower()
                if extra := re.fullmatch(r"dvdquant\[([\w,-]+)\]", plain):
                    wrong += [f"{name}: {word}" for each in extra[1].split(",") if each not in extras]
                elif re.fullmatch(r"[a-z][\w.-]+", plain) and plain not in declared and "--" not in word:
                    wrong.append(f"{name}: {word}")
    assert wrong == []


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"dvdquant-{PROJECT['version']}.dist-info"
    scripts = archive.read(f"{info}/entry_points.txt").decode()
    for name, target in PROJECT["scripts"].items():
        assert f"{name} = {target}" in scripts
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"{info}/licenses/LICENSE" in archive.namelist()


@pytest.mark.slow
def test_installed_wheel_works_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    """Imports from the target folder; -S leaves out this environment's own (editable) dvdquant."""
    code = """
import gc, sys
gc.disable()  # much of an import of PyTorch
target, packages, root = sys.argv[1:]
sys.path[:0] = [target]
sys.path.append(packages)
import dvdquant, dvdquant.export.pipeline, dvdquant.deploy, dvdquant.export.engines.worker
for module in [m for n, m in sys.modules.items() if n.partition(".")[0] == "dvdquant"]:
    assert module.__file__.startswith(target), module
assert not [p for p in sys.path if p.rstrip("/") == root]
from dvdquant.cli.inspect import main
main(["--version"])
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", code, str(installed), sysconfig.get_path("purelib"), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"dvdq-inspect, version {PROJECT['version']}"


def test_scripts_are_installed(installed: Path) -> None:
    names = {path.name for path in (installed / "bin").iterdir()}
    assert names == set(PROJECT["scripts"])


def test_uninstalled_checkout_works(tmp_path: Path) -> None:
    """Its modules are found there, those behind the links too, and a command runs."""
    code = """
import importlib.util, sys
packages, root = sys.argv[1:]
sys.path.append(packages)
import dvdquant.export.engines.precision, dvdquant.deploy.serve.settings
for name, module in [*sys.modules.items()]:
    if name.partition(".")[0] == "dvdquant":
        assert module.__file__.startswith(root), module
for name in ("dvdquant.export.pipeline", "dvdquant.deploy.artifact"):
    assert importlib.util.find_spec(name).origin.startswith(root), name
from dvdquant.cli.inspect import main
main(["--version"])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-c", code, sysconfig.get_path("purelib"), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dvdq-inspect, version ")


# -------------------------------------------------------------------------------------------------------- the checkout


def test_pages_and_package_name_one_version() -> None:
    """What is not released yet has a section above the version, and does not lend its name to it."""
    version, text = PROJECT["version"], (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## (\S+)( \(not released\))?$", text, re.MULTILINE)
    assert version == next(name for name, unreleased in sections if not unreleased)
    assert not sections[0][1] or f"`dvdq --version`, wheels and manifests say {version}." in text
    assert f'__version__ = "{version}"\n' in (ROOT / "dvdquant" / "__init__.py").read_text()


def test_links_inside_the_package(sources: list[str]) -> None:
    found = {name: os.readlink(ROOT / name) for name in sources if (ROOT / name).is_symlink()}
    assert found == LINKS
    for name, target in LINKS.items():
        assert (ROOT / name).is_dir(), f"{name} dangles"
        folder = os.path.normpath(os.path.join(os.path.dirname(name), target)) + "/"
        assert any(n.startswith(folder) for n in sources), f"git would not keep {folder}: it holds no file"


def test_native_folders_are_no_packages(sources: list[str]) -> None:
    assert [n for n in sources if re.match(r"(kernels|plugins)/(.*/)?__init__\.py$", n)] == []


def _python_files(sources: list[str]) -> list[str]:
    return [n for n in sources if n.endswith(".py") and not (ROOT / n).is_symlink()]


@functools.cache
def _tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules that code imports: by statement, by import_module("name"), or in a string of code handed to a child."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # The builder libraries are imported by the names in a table.
            if re.fullmatch(r"tensorrt(_rtx)?", node.value):
                yield node.value
            yield from re.findall(r"(?:^|; )(?:from|import) ([\w.]+)", node.value)


def _imported(sources: list[str], folders: tuple[str, ...]) -> set[str]:
    names = [n for n in _python_files(sources) if n.startswith(folders)]
    return {m.partition(".")[0] for n in names for m in _imports(_tree(n))}


def _modules(requirements: list[str]) -> set[str]:
    names = {re.split(r"[<>=!~ ;\[]", r, maxsplit=1)[0] for r in requirements}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def test_every_dependency_is_used_and_every_import_declared(sources: list[str]) -> None:
    imported = _imported(sources, ("dvdquant/", "export/", "deploy/"))
    declared = _modules(PROJECT["dependencies"])
    assert declared - imported == THROUGH_DIFFUSERS, "declared, never imported"
    optional = _modules(
        PROJECT["optional-dependencies"]["tensorrt"]
        + PROJECT["optional-dependencies"]["serve"]
        + PROJECT["optional-dependencies"]["serve-postgres"]
        + PROJECT["optional-dependencies"]["serve-s3"]
        + PROJECT["optional-dependencies"]["serve-ray"]
        + PROJECT["optional-dependencies"]["text-int8"]
    )
    # Libraries of 8-bit attention: looked for, never needed; sageattention 2.2 is on no registry.
    optional |= {"comfy_kitchen", "cudnn", "fa3_fwd_interface", "sageattention"}
    # Triton's own module, in the process that it runs models in.
    optional |= {"triton_python_backend_utils"}
    # ComfyUI itself, where its nodes run.
    optional |= {"comfy", "folder_paths", "nodes", "execution", "latent_preview"}
    ours = {
        "dvdquant",
        "benchmarks",
        "tests",
        "__future__",
        "pydantic_core",  # a part of pydantic: its error with a context is not in pydantic itself
        "_pytest",  # a part of pytest: how it compiles test files is not in pytest itself
        *(p.stem for p in (*(ROOT / "tests").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"))),
    }
    assert imported - set(sys.stdlib_module_names) - ours - declared - optional == set(), "imported, not declared"
    tested = _imported(sources, ("tests/",)) - set(sys.stdlib_module_names) - ours - declared - optional
    assert tested - _modules(PROJECT["optional-dependencies"]["test"]) == set(), "imported by tests, not declared"


def test_no_registry_host_and_no_machine_path(sources: list[str]) -> None:
    # Written in pieces, or this file would find itself.
    hosts = ["pypi" + ".org", "python" + "hosted", "pypi" + ".nvidia", "download.py" + "torch", "ngc.nvidia" + ".com"]
    paths = ["/wo" + "rk/", "/root" + "/", "/opt" + "/pypi", "file" + "://"]
    found = []
    for name in sources:
        if (ROOT / name).is_symlink() or name.endswith(BINARY):
            continue
        text = (ROOT / name).read_text()
        found += [f"{name}: {needle}" for needle in hosts + paths if needle in text]
        found += [f"{name}: {m}" for m in re.findall(r"--(?:extra-)?index" + r"-url\S*", text)]
    assert found == []


def test_tests_read_nothing_outside_the_checkout(sources: list[str]) -> None:
    """The folder above the checkout is not part of it: what a test finds there, another machine lacks."""
    found = []
    for name in _python_files(sources):
        if name.startswith("tests/"):
            text = (ROOT / name).read_text()
            climbs = [int(level) for level in re.findall(r"parents" + r"\[(\d)\]", text)]
            # A file in tests/ reaches the checkout by its second parent, one in tests/room/ by its third.
            if re.search(r"\bROOT" + r"\.parent\b", text) or any(level > name.count("/") for level in climbs):
                found.append(name)
    assert found == []


def test_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_torch_is_pinned_in_one_place(sources: list[str]) -> None:
    pins = [n for n in sources if not n.endswith(BINARY) and not (ROOT / n).is_symlink()
            and re.search(r"torch==\d", (ROOT / n).read_text())]  # fmt: skip
    assert pins == ["constraints.txt"]


def test_cores_are_counted_in_one_place(sources: list[str]) -> None:
    """A container or taskset leaves a process some of them. The build of the kernels runs without the package."""
    found = [n for n in _python_files(sources) if re.search(r"cpu_count|sched_getaffinity", (ROOT / n).read_text())]
    ours = ["kernels/build.py", "dvdquant/system/processor.py", "tests/system/test_processor.py"]
    assert sorted(found) == sorted([*ours, "tests/test_repository.py"])


# --------------------------------------------------------------------------------------------------- make, CI, skipping


def test_ci_calls_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert {"make test", "make slow"} <= set(lines)


@pytest.mark.parametrize("target", ["help", "venv", "demo", "test", "slow", "lint", "clean"])
def test_make_targets(target: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    helped = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert target == "help" or f"make {target}" in helped


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('#!/bin/sh\nexec "{python}" -c "import sys, collections\n'
         'sys.version_info = collections.namedtuple(\'v\', \'major minor\')(3, 10)\n$2"\n', "is Python 3.10"),
        (None, "was not found"),
    ],
    ids=["old", "missing"],
)  # fmt: skip
def test_make_refuses_a_python_it_cannot_use(script: str | None, said: str, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    python = tmp_path / "python3"
    if script is not None:
        python.write_text(script.replace("{python}", sys.executable))
        python.chmod(0o755)
    command = ["make", "venv", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert said in done.stderr
    assert "3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_skips_are_listed_with_what_is_missing(tmp_path: Path) -> None:
    """The conftest of this suite on tests that need what a child without CUDA, TensorRT and headers lacks."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "conftest.py")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['tensorrt'] = sys.modules['tensorrt_lean'] = None\n"
    )
    # In the place of PyTorch, whose import takes seconds: all that the conftest asks it for.
    (tmp_path / "torch.py").write_text(
        "class version:\n    cuda = None\nclass cuda:\n    is_available = staticmethod(lambda: False)\n__version__ = '0'\n"
    )
    marks = ("slow", "gpu", "tensorrt", "tensorrt_lean", "tensorrt_headers")
    body = [f"@pytest.mark.{m}\ndef test_{m}():\n    pass\n" for m in marks]
    (tmp_path / "test_marks.py").write_text("\n".join(["import pytest", *body, "def test_plain():\n    pass\n"]))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TENSORRT_ROOT"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    options = ["-v", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout
    assert "2 passed, 4 skipped" in done.stdout.splitlines()[-1]
    closing = done.stdout.partition("not run here")[2]
    for name, needed in (
        ("gpu", "CUDA device"),
        ("tensorrt", "module `tensorrt`"),
        ("tensorrt", "pip install 'dvdquant[tensorrt]'"),
        ("tensorrt_lean", "pip install 'dvdquant[tensorrt-lean]'"),
        ("tensorrt_headers", "TENSORRT_ROOT"),
    ):
        assert needed in closing
        assert f"test_marks.py::test_{name}\n" in closing


def test_the_tests_that_others_name_are_there() -> None:
    """The page of the fault campaign, its parts, and the files of the variants: a renamed test takes its name along."""
    named = re.findall(
        r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "fault-campaign.md").read_text(encoding="utf-8")
    )
    assert len(named) > 50
    parts = [part.partition("::") for part in run_campaign.PARTS.values()]
    for file, name in [*named, *((file, name.partition("[")[0]) for file, _, name in parts)]:
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
    files = [path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")]
    assert set(run_variants.NUMERIC) <= set(files)


def test_the_longest_files_are_there_and_come_first() -> None:
    tests = ROOT / "tests"
    assert [name for name in LONGEST if not (tests / name).is_file()] == []
    short, outside = tests / "test_readme.py", Path("/elsewhere/test_serve.py")
    files = [short, outside, *(tests / name for name in reversed(LONGEST))]
    assert sorted(files, key=lambda path: longest_first(path, tests)) == [
        *(tests / name for name in LONGEST),
        short,
        outside,
    ]


def test_no_helper_of_tests_has_the_name_of_a_library() -> None:
    """A helper that is run by its path stands before all libraries: secrets.py there would be NumPy's secrets."""
    libraries = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), "triton", "tensorrt"}
    helpers = {path.stem for path in (ROOT / "tests" / "support").glob("*.py")}
    assert helpers
    assert not helpers & libraries


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _public_functions(body: list[ast.stmt], of_class: str = "") -> Iterator[tuple[Function, str]]:
    """Every public function with its documentation; that of a constructor may be its class's."""
    for node in body:
        name = getattr(node, "name", "_")
        if isinstance(node, ast.ClassDef) and not name.startswith("_"):
            yield from _public_functions(node.body, ast.get_docstring(node) or "")
        elif isinstance(node, Function) and (name == "__init__" or not name.startswith("_")):
            own = ast.get_docstring(node) or ""
            yield node, f"{of_class}\n{own}" if name == "__init__" else own


def _undocumented(function: Function, text: str) -> list[str]:
    """Arguments without a line of their own. What another class documents is named: "see :meth:`…`"; options have a help."""
    if re.search(r":(class|meth):`", text.partition("Args:")[0]) and "Args:" not in text:
        return []
    if any(re.search(r"click\.|\.setter$", ast.unparse(each)) for each in function.decorator_list):
        return []
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a]
    return [
        n
        for n in names
        if n not in ("self", "cls") and not n.startswith("_") and not re.search(rf"^ +[*]*{n}( \(.*\))?:", text, re.M)
    ]


def test_every_argument_of_a_public_function_is_documented(sources: list[str]) -> None:
    """What D417 does not see: a function or a constructor without any Args, and two arguments in one line."""
    rooms = ("dvdquant/", "export/", "deploy/", "benchmarks/quality/")
    missing, seen = [], 0
    for name in sources:
        if name.startswith(rooms) and name.endswith(".py"):
            for function, text in _public_functions(_tree(name).body):
                seen += 1
                if found := _undocumented(function, text):
                    missing.append(f"{name}:{function.lineno} {function.name}: {', '.join(found)}")
    assert seen > 1000
    assert missing == []


_CLAUSE = re.compile(r"(What|How|Whether|Where|Which|Why|Who|Of|As|For)\b")


def test_a_docstring_begins_with_what_can_be_read_alone(sources: list[str]) -> None:
    """A clause that begins with "What" or "Whether" is half a sentence; ruff's D401 looks at functions alone."""
    assert _CLAUSE.match("What a push would send.")
    assert not _CLAUSE.match("The files that a push would send.")
    found, seen = [], 0
    for name in sources:
        if name.startswith(("dvdquant/", "export/", "deploy/")) and name.endswith(".py"):
            for node in ast.walk(_tree(name)):
                if isinstance(node, Function | ast.ClassDef) and (text := ast.get_docstring(node)):
                    seen += 1
                    if _CLAUSE.match(text):
                        found.append(f"{name}:{node.lineno} {node.name}")
    assert seen > 2000
    assert found == []


def _defined(tree: ast.AST) -> set[str]:
    """Names that a file or a class defines, with those of its classes, and what is stored on ``self``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def test_what_docstrings_refer_to_is_there(sources: list[str]) -> None:
    """``:class:`.module.Name``` names a module of ours and what it defines; no tool resolves these."""
    ours = [n for n in sources if n.startswith(("dvdquant/", "export/", "deploy/")) and n.endswith(".py")]
    modules: dict[str, set[str]] = {}
    for name in ours:
        path = Path(name)
        modules.setdefault(path.parent.name if path.stem == "__init__" else path.stem, set()).update(
            _defined(_tree(name))
        )
    every = set().union(*modules.values())
    missing, seen = [], 0
    for name in ours:
        for kind, reference in re.findall(r":(mod|func|class|meth|data|attr):`([\w.]+)`", (ROOT / name).read_text()):
            parts = [part for part in reference.split(".") if part]
            if parts[0] in ("torch", "click", "html"):
                continue
            seen += 1
            # The module that is named last, and what it defines; without one, a class or a function of any module.
            at = max((i for i, part in enumerate(parts) if part in modules), default=None)
            if at is not None:
                known = at + 1 == len(parts) or parts[at + 1] in modules[parts[at]]
            else:
                known = kind != "mod" and parts[0] in every and (len(parts) == 1 or parts[0][0].isupper())
            if not known:
                missing.append(f"{name}: {reference}")
    assert seen > 300
    assert missing == []


def _fields(record: ast.ClassDef) -> list[str]:
    """The public fields of a dataclass that its maker gives."""
    if not any("dataclass" in ast.unparse(each) for each in record.decorator_list):
        return []
    declared = [node for node in record.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return [
        ast.unparse(node.target)
        for node in declared
        if not ast.unparse(node.target).startswith("_") and not re.search(r"ClassVar|init=False", ast.unparse(node))
    ]


def test_every_field_of_a_public_record_is_documented(sources: list[str]) -> None:
    """A line under Args, or a text behind the field. The options of dvdq-run are described where click reads them."""
    missing, seen = [], 0
    for name in sources:
        if not (name.startswith(("dvdquant/", "export/", "deploy/")) and name.endswith(".py")):
            continue
        for record in ast.walk(_tree(name)):
            if not isinstance(record, ast.ClassDef) or record.name.startswith("_") or record.name == "RunOptions":
                continue
            text = ast.get_docstring(record) or ""
            behind = {
                ast.unparse(field.target)
                for field, after in zip(record.body, record.body[1:])
                if isinstance(field, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            }
            fields = _fields(record)
            seen += len(fields)
            left = [each for each in fields if each not in behind and not re.search(rf"^ +{each}:", text, re.M)]
            if left:
                missing.append(f"{name}:{record.lineno} {record.name}: {', '.join(left)}")
    assert seen > 500
    assert missing == []
