"""The tools that a build of the kernels needs: nvcc, CUTLASS headers and nvdisasm, found here or fetched by pip."""

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
# The compiler's wheels do not hold the disassembler; this one reads the cubins of CUDA 13.0.
NVDISASM = "nvidia-cuda-nvdisasm==13.2.51"
# The CUDA runtime; its archive for another processor is linked into a library for that.
CUDA_RUNTIME = "nvidia-cuda-runtime==13.0.96"
# Only this set works without a system CUDA, so every part is pinned.
NVCC_WHEELS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    CUDA_RUNTIME,
    "nvidia-cuda-cccl==13.0.85",
)


class BuildError(Exception):
    """A reason that stops the build and that its user can act on; the text says what, what is available, and a fix."""


@dataclass(frozen=True)
class Host:
    """The processor that a library is built for, where it is not this machine's.

    Args:
        machine: Its name, as ``uname -m`` says it there.
        prefix: What the names of the compiler and the binutils begin with.
        wheels: The platform tag of its wheels.
    """

    machine: str
    prefix: str
    wheels: str

    def tool(self, name: str) -> str:
        """Return the path of a tool, such as ``g++``.

        Args:
            name: The name that the tool has on its own machine.

        Raises:
            BuildError: It is not installed.
        """
        found = shutil.which(self.prefix + name)
        if found is None:
            raise BuildError(
                f"{self.prefix}{name} was not found, which compiles for {self.machine}.\n"
                f"Debian and Ubuntu have it: apt-get install g++-{self.machine}-linux-gnu"
            )
        return found


HOSTS = {"aarch64": Host("aarch64", "aarch64-linux-gnu-", "manylinux2014_aarch64")}


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler.

    Args:
        program: The path of nvcc.
        version: The line of ``nvcc --version`` that names the build.
        libraries: The folders with the CUDA runtime, for -L.
        includes: The folders with its headers. nvcc finds them itself, but not where it compiles for another processor.
    """

    program: str
    version: str
    libraries: tuple[str, ...]
    includes: tuple[str, ...] = ()


def find_nvcc(build: Path, fetch: bool = False) -> Nvcc:
    """Return nvcc from PATH, CUDA_HOME or CUDA_PATH, this Python's own packages, or wheels under ``build``.

    Args:
        build: The build folder.
        fetch: If there is none, fetch its wheels into the build folder.

    Raises:
        BuildError: There is none.
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
    """Return the compiler with its version and its libraries.

    Raises:
        BuildError: It does not run.
    """
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines() if "release" in line]
    if done.returncode != 0 or not lines:
        raise BuildError(f"{program} --version failed: {(done.stderr or done.stdout).strip()}")
    root = Path(program).resolve().parent.parent
    candidates = [root / "lib64", root / "lib", Path("/usr/local/cuda/lib64")]
    # A program on PATH may be a link or a script that starts the compiler of the usual place.
    headers = (root / "include", Path("/usr/local/cuda/include"))
    include = next((path for path in headers if (path / "cuda_runtime.h").is_file()), None)
    return Nvcc(
        program,
        lines[-1],
        tuple(str(path) for path in candidates if path.is_dir()),
        () if include is None else (str(include), str(include / "cccl")),
    )


def find_host_runtime(build: Path, host: Host) -> Path:
    """Return the folder with libcudart_static.a for another processor, fetched once into ``build/cudart``.

    Args:
        build: The build folder.
        host: The processor.

    Raises:
        BuildError: pip failed, or its package holds none.
    """
    folder = build / f"cudart-{host.machine}"
    if not folder.is_dir():
        pip_install((CUDA_RUNTIME,), folder, dependencies=False, platform=host.wheels)
    found = next(folder.rglob("libcudart_static.a"), None)
    if found is None:
        raise BuildError(f"{CUDA_RUNTIME} for {host.machine} holds no libcudart_static.a; remove {folder}")
    return found.parent


def find_cutlass(build: Path) -> Path:
    """Return the include folder of CUTLASS: from CUTLASS_ROOT, else fetched once into ``build/cutlass``.

    Args:
        build: The build folder.

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
    """Return the include folder of CUTLASS under ``root``, or None."""
    for inner in ("include", "source/include", "cutlass_library/source/include", "."):
        if (root / inner / "cutlass" / "cutlass.h").is_file():
            return root / inner
    return None


def find_nvdisasm(build: Path) -> str:
    """Return the path of nvdisasm from PATH or CUDA_HOME, else fetched once into ``build/nvdisasm``.

    Args:
        build: The build folder.

    Raises:
        BuildError: pip failed, or its package holds none.
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
    """Yield a file beside ``target`` that takes its place if the block ends well, and is deleted otherwise.

    The build needs no dvdquant, so this is its own; ``dvdquant.system.whole_file`` is the one of the package.

    Args:
        target: The file to write.
    """
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def pip_install(packages: tuple[str, ...], target: Path, dependencies: bool, platform: str | None = None) -> None:
    """Install packages with pip into a folder of their own, all or nothing.

    Args:
        packages: The requirements, such as "name==1.0".
        target: The folder, which is replaced.
        dependencies: Install what they depend on, too.
        platform: The tag of another platform, whose wheels are taken; None means this one.

    Raises:
        BuildError: pip failed; the text holds its last words.
    """
    print(f"fetching {', '.join(packages)}", file=sys.stderr)
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(temporary)]
    command += [*([] if dependencies else ["--no-deps"]), *packages]
    command += ["--platform", platform, "--only-binary=:all:"] if platform else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        shutil.rmtree(temporary, ignore_errors=True)
        raise BuildError(f"pip could not install {', '.join(packages)}:\n{done.stderr.strip()[-2000:]}")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def available_memory() -> int:
    """Return the bytes of memory that programs can still take; 8 GiB if the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        # Only Linux has it.
        return 8 << 30
    return 8 << 30
