"""The GPU that a user names, or that is in this machine."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from dataclasses import dataclass

from dvdquant.errors import UnsupportedError
from dvdquant.hardware.capabilities import CAPABILITIES, capability
from dvdquant.hardware.gpus import GPUS, Gpu
from dvdquant.system.gpu import read_gpu
from dvdquant.text import shown

__all__ = ["Installed", "find_gpu", "installed_gpus", "resolve_gpu"]

_QUERY = ("name", "compute_cap", "memory.total", "driver_version")
_NOISE = re.compile(r"nvidia|geforce|tesla|quadro|jetson|graphics|gpu|generation|edition|[^a-z0-9 ]")
_SIZE = re.compile(r"\d+\s*gi?b|pcie|sxm\d?|hbm\d\w?|mig.*|max q")


@dataclass(frozen=True)
class Installed:
    """A GPU of this machine, as its driver names it.

    Args:
        name: The driver's name.
        sm: Its compute capability; "" where an old driver does not say it.
        memory_mib: Its memory in MiB.
        driver: The version of the driver.
    """

    name: str
    sm: str
    memory_mib: int
    driver: str


def installed_gpus() -> list[Installed]:
    """Return the GPUs of this machine, without CUDA and PyTorch; empty where there is none.

    ``nvidia-smi`` lists them; a Jetson has none, and there the driver itself is asked.
    """
    program = shutil.which("nvidia-smi")
    found = _listed(program) if program is not None else []
    if not found and (gpu := read_gpu()) is not None:
        found = [Installed(gpu.name, gpu.sm, gpu.memory_bytes >> 20, "")]
    return found


def _listed(program: str) -> list[Installed]:
    """Return what nvidia-smi lists."""
    command = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == len(_QUERY):
            memory = int(parts[2]) if parts[2].isdigit() else 0
            sm = parts[1] if re.fullmatch(r"\d+\.\d", parts[1]) else ""
            found.append(Installed(parts[0], sm, memory, parts[3]))
    return found


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name, written in whatever way.

    Args:
        name: Such as "RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090" or "NVIDIA H100 80GB HBM3".

    Raises:
        UnsupportedError: There is no such GPU in the table; the error has near names.
    """
    known = _names()
    key = _key(name)
    if key in known:
        return known[key]
    # "NVIDIA L40S-48Q", "RTX PRO 6000 Blackwell Server": the longest name that the text begins with.
    words = _words(name)
    for length in range(len(words) - 1, 0, -1):
        if (start := "".join(words[:length])) in known:
            return known[start]
    # "4090", "RTX PRO 6000": the shortest of the names that hold it, where they are of one compute capability.
    holding = [gpu for each, gpu in known.items() if key in each and any(c.isdigit() for c in key)]
    if len({gpu.sm for gpu in holding}) == 1:
        return min(holding, key=lambda gpu: len(gpu.name))
    near = [known[each].name for each in difflib.get_close_matches(key, known, n=4, cutoff=0.5)]
    raise UnsupportedError(
        f"there is no GPU {name!r:.60} in the table",
        available=", ".join(dict.fromkeys(near)) or "dvdq export --list-gpus lists them",
        fix="give one of these names, or the compute capability of yours with --sm",
    )


def resolve_gpu(name: str) -> tuple[str, str]:
    """Return the name and the compute capability of the GPU that ``--gpu`` means.

    Args:
        name: A name, or ``auto`` for the GPU of this machine.

    Raises:
        UnsupportedError: It is unknown, nothing is offered for it, or ``auto`` finds no GPU.
    """
    if name.strip().lower() != "auto":
        gpu = find_gpu(name)
        return gpu.name, _offered(gpu.name, gpu.sm)
    there = installed_gpus()
    if not there:
        raise UnsupportedError(
            "--gpu auto found no GPU: nvidia-smi is not there, or lists none",
            fix='name the card that it is for, such as --gpu "RTX 4090", or install its driver',
        )
    first = there[0]
    return first.name, _offered(first.name, first.sm or find_gpu(first.name).sm)


def _offered(name: str, sm: str) -> str:
    """Return the compute capability.

    Raises:
        UnsupportedError: Nothing is offered for it.
    """
    found = CAPABILITIES.get(sm)
    if found is not None and found.refused:
        raise UnsupportedError(
            f"nothing is offered for {shown(name)} (SM {sm}): {found.refused}",
            available=[each.sm for each in CAPABILITIES.values() if not each.refused],
            fix="use a card of one of these SMs; dvdq export --list-gpus names them",
        )
    return capability(sm).sm


def _names() -> dict[str, Gpu]:
    """Return every name in its shortest form."""
    return {_key(name): gpu for gpu in GPUS for name in (gpu.name, *gpu.names)}


def _words(name: str) -> list[str]:
    """Return the words of a name that tell cards apart, in lower case, "rtx4090ti" cut into its parts."""
    text = _NOISE.sub(" ", _SIZE.sub(" ", name.lower().replace("-", " ")))
    text = re.sub(r"(?<=rtx)(?=\d)|(?<=gtx)(?=\d)|(?<=\d)(?=ti\b|super\b|laptop\b)|(?<=ti)(?=super\b)", " ", text)
    return text.split()


def _key(name: str) -> str:
    return "".join(_words(name))
