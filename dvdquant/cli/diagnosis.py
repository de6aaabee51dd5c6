"""What this machine has of all that an export and its runtime can use; each finding says how to get what is missing."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from dvdquant import __version__
from dvdquant.errors import DvdquantError, UnsupportedError
from dvdquant.hardware.advice import choose_recipe, choose_target
from dvdquant.hardware.capabilities import CAPABILITIES, sm_number
from dvdquant.hardware.find import Installed, find_gpu, installed_gpus
from dvdquant.hardware.weights import slower_in_int8
from dvdquant.system.processor import usable_cores
from dvdquant.text import amount

__all__ = ["Finding", "diagnose", "driver_problem"]

_TORCH = "pip install --force-reinstall torch"
State = Literal["ok", "missing", "problem"]
PACKAGES = ("diffusers", "transformers", "numba", "onnx", "nvidia-modelopt")

# The least branch of the driver that runs programs of a major version of CUDA (table 1 of
# docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
DRIVERS: dict[int, tuple[int, ...]] = {12: (525,), 13: (580,)}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Args:
        name: What it is.
        state: ``ok``; ``missing``, which some uses do without; ``problem``: it is there and cannot be used.
        found: What was found, in words.
        fix: How to get it, or to get it right; "" where nothing is wrong.
    """

    name: str
    state: State
    found: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the finding as a plain dict."""
        return asdict(self)


def diagnose(out: Path) -> Iterator[Finding]:
    """Look at one thing after the other; a broken library is a finding and no error.

    Args:
        out: The folder whose disk is asked for its free space.
    """
    yield Finding(
        "dvdquant",
        "ok",
        f"{__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    )
    gpus = installed_gpus()
    yield from _gpus(gpus)
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "PyTorch": lambda: _torch(gpus),
        "libraries": _packages,
        "CUDA kernels": lambda: _kernels(gpus),
        "attention in 8 bits": lambda: _attention(gpus),
        "TensorRT-RTX": lambda: _builder("TensorRT-RTX", "tensorrt_rtx"),
        "TensorRT": lambda: _builder("TensorRT", "tensorrt"),
        "TensorRT lean runtime": lambda: _builder("TensorRT lean runtime", "tensorrt_lean"),
        "ONNX Runtime": _onnxruntime,
        "nvcc": _compiler,
        "disk and memory": lambda: _space(out),
    }
    for name, look in looks.items():
        yield from _safely(name, look)
    yield _would_run(gpus)


def _safely(name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of one look; what it raises is a finding, too."""
    try:
        yield from look()
    except DvdquantError as error:
        found = error.what if error.available is None else f"{error.what}; {error.available}"
        yield Finding(name, "problem", found, error.fix or "")
    except Exception as error:  # noqa: BLE001  # a broken library may raise anything, and the other checks still matter
        yield Finding(name, "problem", f"{type(error).__name__}: {error}", "install the library anew")


def _gpus(gpus: list[Installed]) -> Iterator[Finding]:
    """Return a finding for every GPU and its driver."""
    if not gpus:
        yield Finding(
            "GPU", "missing", "none: nvidia-smi is not there, or lists none",
            f"exporting needs none; to run on one, {_driver_advice()}, and start a container with --gpus all",
        )  # fmt: skip
    for gpu in gpus:
        words = f"{gpu.name}, SM {_sm(gpu) or 'unknown'}, {amount(gpu.memory_mib << 20)}"
        words += f", driver {gpu.driver}" if gpu.driver else ""
        known = CAPABILITIES.get(_sm(gpu))
        if known is not None and known.refused:
            yield Finding(
                "GPU", "problem", f"{words}: {known.refused}", "use another card: dvdq export --list-gpus names them"
            )
        else:
            slow = slower_in_int8(sm_number(_sm(gpu))) if known is not None else ""
            yield Finding("GPU", "ok", f"{words}; slow in 8 bits: {slow}" if slow else words)


def _driver_advice() -> str:
    """Return how this system gets a driver. WSL 2 takes that of Windows, and its kernel's release has Microsoft's name."""
    if "microsoft" in platform.release().lower():
        return "install NVIDIA's driver in Windows and none in WSL"
    return "install its driver"


def _sm(gpu: Installed) -> str:
    """Return the compute capability; an old driver does not say it, and then the table does."""
    if gpu.sm:
        return gpu.sm
    with contextlib.suppress(UnsupportedError):
        return find_gpu(gpu.name).sm
    return ""


def driver_problem(driver: str, cuda: str) -> str | None:
    """Return what is wrong with a driver for a release of CUDA, or None.

    Args:
        driver: The version of the driver, such as "580.65.06".
        cuda: The release of CUDA that PyTorch was built with, such as "13.0".
    """
    least = DRIVERS.get(int(cuda.partition(".")[0])) if cuda[:1].isdigit() else None
    numbers = tuple(int(part) for part in driver.split(".") if part.isdigit())
    if least is None or not numbers or numbers >= least:
        return None
    return f"driver {driver} is too old for CUDA {cuda}: it needs {'.'.join(f'{n:02d}' for n in least)} or newer"


def _torch(gpus: list[Installed]) -> Iterator[Finding]:
    """Return the finding about PyTorch: its build, and whether it sees the GPU."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001  # a torch that does not load fails in many ways
        yield Finding(
            "PyTorch",
            "problem",
            f"it cannot be imported: {error}",
            f"install it anew: {_TORCH}",
        )
        return
    cuda = torch.version.cuda
    words = f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'built for the CPU alone'}, {torch.get_num_threads()} threads"
    if not gpus:
        yield Finding("PyTorch", "ok", words)
    elif cuda is None:
        yield Finding(
            "PyTorch",
            "problem",
            f"{words}, and there is a GPU",
            f"install a build for CUDA: {_TORCH}",
        )
    elif not torch.cuda.is_available():
        why = driver_problem(gpus[0].driver, cuda) or "it sees no GPU"
        yield Finding(
            "PyTorch",
            "problem",
            f"{words}: {why}",
            "update the driver, or check CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding("PyTorch", "ok", f"{words}, sees {torch.cuda.device_count()} GPU")


def _packages() -> Iterator[Finding]:
    """Return the versions of the libraries that a model and its export need."""
    there, gone = [], []
    for name in PACKAGES:
        try:
            there.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            gone.append(name)
    yield Finding(
        "libraries", "problem" if gone else "ok", ", ".join([*there, *(f"no {name}" for name in gone)]),
        f"pip install {' '.join(gone)}" if gone else "",
    )  # fmt: skip


def _kernels(gpus: list[Installed]) -> Iterator[Finding]:
    """Return the finding about our CUDA kernels."""
    from dvdquant.ops.cuda.errors import BUILD
    from dvdquant.ops.cuda.find import find_library, load_library

    if find_library() is None:
        yield Finding("CUDA kernels", "missing", "not built: PyTorch sessions run without them, slower", BUILD)
        return
    library = load_library()
    words = f"{library.path}, for SM {', '.join(library.architectures)}"
    lacking = [sm for sm in map(_sm, gpus) if sm and not library.serves(sm_number(sm))]
    state: State = "problem" if lacking else "ok"
    yield Finding(
        "CUDA kernels", state, words + (f", none for SM {lacking[0]}" if lacking else ""), BUILD if lacking else ""
    )


def _attention(gpus: list[Installed]) -> Iterator[Finding]:
    """Return the finding about libraries for 8-bit attention."""
    from dvdquant.ops.attention.libraries import LIBRARIES, ladder

    there = [library.name for library in LIBRARIES.values() if library.installed() is None]
    sms = [sm_number(sm) for sm in map(_sm, gpus) if sm]
    if not sms:
        found = f"installed: {', '.join(there) or 'none'}; they need a GPU"
        yield Finding(
            "attention in 8 bits",
            "ok" if there else "missing",
            found,
            "" if there else "pip install 'dvdquant[attention]'",
        )
        return
    tried = {library.name: library.refused(sms[0]) for wanted in ("int8", "fp8") for library in ladder(wanted, sms[0])}
    usable = [name for name, refused in tried.items() if refused is None]
    words = f"for SM {sms[0] / 10}: " + (
        "; ".join(f"{n}{f' ({r})' if r else ''}" for n, r in tried.items()) or "no library has kernels"
    )
    extra = "dvdquant[attention-sm90]" if sms[0] == 90 else "dvdquant[attention]"
    yield Finding(
        "attention in 8 bits", "ok" if usable else "missing", words, "" if usable else f"pip install '{extra}'"
    )


def _builder(name: str, module: str) -> Iterator[Finding]:
    """Return the finding about one of the engine libraries."""
    from dvdquant.backends import load_backend

    try:
        yield Finding(name, "ok", f"{load_backend(module).version}")
    except DvdquantError as error:
        yield Finding(name, "missing", error.what, error.fix or "")


def _onnxruntime() -> Iterator[Finding]:
    """Return the finding about ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError as error:
        yield Finding("ONNX Runtime", "missing", str(error), "pip install onnxruntime-gpu")
        return
    providers = [each.removesuffix("ExecutionProvider") for each in onnxruntime.get_available_providers()]
    yield Finding("ONNX Runtime", "ok", f"{onnxruntime.__version__}: {', '.join(providers)}")


def _compiler() -> Iterator[Finding]:
    """Return the finding about nvcc, which only a build of the kernels needs."""
    home = os.environ.get("CUDA_HOME", "")
    nvcc = shutil.which("nvcc") or (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None)
    yield Finding(
        "nvcc", "ok" if nvcc else "missing", nvcc or "not on PATH, nor in CUDA_HOME; only a build of the kernels needs it",
        "" if nvcc else "install a CUDA toolkit, or set CUDA_HOME",
    )  # fmt: skip


def _space(out: Path) -> Iterator[Finding]:
    """Return the finding about disk and memory."""
    from dvdquant.system.memory import memory_limit

    place = next((folder for folder in (out, *out.absolute().parents) if folder.is_dir()), Path("/"))
    free = shutil.disk_usage(place).free
    state: State = "ok" if free > 1 << 30 else "problem"
    words = f"{amount(free)} free at {place}, {amount(memory_limit())} of memory free, {usable_cores()} cores"
    yield Finding(
        "disk and memory",
        state,
        words,
        "" if state == "ok" else "free some space; a dry run says how much an export takes",
    )


def _would_run(gpus: list[Installed]) -> Finding:
    """Return what an export for this machine is, and what runs it."""
    sm = next((sm for sm in map(_sm, gpus) if sm in CAPABILITIES and not CAPABILITIES[sm].refused), None)
    if sm is None:
        return Finding(
            "what would run",
            "ok",
            "exports for any card, built here without a GPU; clips on the CPU by ONNX Runtime, which suits toy models",
        )
    target, _ = choose_target([sm])
    advice = choose_recipe([sm], [target])
    runner = "TensorRT-RTX engines" if target == "rtx" else "PyTorch sessions on the CUDA kernels"
    return Finding(
        "what would run",
        "ok",
        f"--gpu auto makes recipe {advice.recipe}, target {target}: {advice.reason}; dvdq run takes {runner}",
    )
