"""What a build of the kernels needs from outside: nvcc, CUTLASS headers, nvdisasm; found on this machine or fetched by pip."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CUTLASS = "nvidia-cutlass==4.2.0.0"
# The disassembler is not part of the compiler's wheels; this one reads the cubins of CUDA 13.0.
NVDISASM = "nvidia-cuda-nvdisasm==13.2.51"
# Only this set works without a system CUDA: every part pinned.
NVCC_WHEELS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)


class BuildError(Exception):
    """The build cannot go on for a reason its user can act on; the text says what, what is available, and the fix."""


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler.

    Args:
        program: path of nvcc. version: the line of ``nvcc --version`` that names the build.
        libraries: folders with the CUDA runtime, for -L.
    """

    program: str
    version: str
    libraries: tuple[str, ...]


def find_nvcc(build: Path, fetch: bool = False) -> Nvcc:
    """nvcc from PATH, CUDA_HOME or CUDA_PATH, this Python's own packages, or wheels under ``build``.

    Raises:
        BuildError: there is none.
    """
    places = [shutil.which("nvcc")]
    places += [
        str(Path(os.environ[name]) / "bin" / "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    places += [
        str(root / "nvidia" / "cu13" / "bin" / "nvcc") for root in (Path(sysconfig.get_path("purelib")), build / "nvcc")
    ]
    for place in places:
        if place and os.access(place, os.X_OK):
            return _describe_nvcc(place)
    if fetch:
        pip_install(NVCC_WHEELS, build / "nvcc", dependencies=False)
        return find_nvcc(build)
    raise BuildError(
        "nvcc was not found: looked on PATH, in CUDA_HOME and CUDA_PATH, and for nvidia-cuda-nvcc in this Python.\n"
        "Install the CUDA 13.0 toolkit, or let this build fetch the compiler's wheels (0.5 GB):\n"
        "    python kernels/build.py --fetch-nvcc"
    )


def _describe_nvcc(program: str) -> Nvcc:
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines() if "release" in line]
    if done.returncode != 0 or not lines:
        raise BuildError(f"{program} --version failed: {(done.stderr or done.stdout).strip()}")
    root = Path(program).resolve().parent.parent
    candidates = [root / "lib64", root / "lib", Path("/usr/local/cuda/lib64")]
    return Nvcc(program, lines[-1], tuple(str(path) for path in candidates if path.is_dir()))


def find_cutlass(build: Path) -> Path:
    """The include folder of CUTLASS: from CUTLASS_ROOT, else fetched once into ``build/cutlass``.

    Raises:
        BuildError: CUTLASS_ROOT holds none, or pip failed.
    """
    given = os.environ.get("CUTLASS_ROOT")
    root = Path(given) if given else build / "cutlass"
    if not given and not _cutlass_include(root):
        pip_install((CUTLASS,), root, dependencies=False)
    include = _cutlass_include(root)
    if include is None:
        raise BuildError(f"no include/cutlass/cutlass.h under CUTLASS_ROOT={root}; unset it to fetch {CUTLASS}")
    return include


def _cutlass_include(root: Path) -> Path | None:
    for inner in ("include", "source/include", "cutlass_library/source/include", "."):
        if (root / inner / "cutlass" / "cutlass.h").is_file():
            return root / inner
    return None


def find_nvdisasm(build: Path) -> str:
    """nvdisasm from PATH or CUDA_HOME, else fetched once into ``build/nvdisasm``.

    Raises:
        BuildError: pip failed.
    """
    home = os.environ.get("CUDA_HOME")
    for place in (shutil.which("nvdisasm"), str(Path(home) / "bin" / "nvdisasm") if home else None):
        if place and os.access(place, os.X_OK):
            return place
    folder = build / "nvdisasm"
    found = next((path for path in folder.rglob("nvdisasm") if path.is_file()), None)
    if found is None:
        pip_install((NVDISASM,), folder, dependencies=False)
        found = next((path for path in folder.rglob("nvdisasm") if path.is_file()), None)
    if found is None:
        raise BuildError(f"{NVDISASM} holds no nvdisasm")
    found.chmod(0o755)
    return str(found)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a file beside ``target`` that takes its place if the block ends well, and goes otherwise.

    The build needs no dvdquant, so this is its own; ``dvdquant.system.whole_file`` is the one of the package.
    """
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def pip_install(packages: tuple[str, ...], target: Path, dependencies: bool) -> None:
    """pip install into a folder of its own, all or nothing.

    Raises:
        BuildError: pip failed; with its last words.
    """
    print(f"fetching {', '.join(packages)}", file=sys.stderr)
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(temporary)]
    command += [*([] if dependencies else ["--no-deps"]), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        shutil.rmtree(temporary, ignore_errors=True)
        raise BuildError(f"pip could not install {', '.join(packages)}:\n{done.stderr.strip()[-2000:]}")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def available_memory() -> int:
    """Bytes of memory that programs can still take; 8 GB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        # Only Linux has it.
        return 8 << 30
    return 8 << 30
