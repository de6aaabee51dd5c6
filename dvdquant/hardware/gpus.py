"""The table of GPUs: name, compute capability, memory and kind.

Memory is what the maker states, in GB; cards that are sold with several sizes are listed with each of them. Where the
figures come from, and which are from memory, is in docs/hardware.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["GPUS", "KINDS", "MACHINES", "Gpu", "Kind", "Machine", "cards_with", "machine_of"]

Kind = Literal["desktop", "laptop", "workstation", "server", "jetson"]
Machine = Literal["aarch64", "x86_64"]

MACHINES: tuple[Machine, ...] = ("aarch64", "x86_64")
"""The processors that dvdquant runs on, as ``uname -m`` says them."""

KINDS: dict[Kind, str] = {
    "desktop": "GeForce RTX",
    "laptop": "GeForce RTX in laptops",
    "workstation": "RTX PRO and RTX A",
    "server": "Data centre",
    "jetson": "Jetson and small machines",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU that is sold.

    Args:
        name: Its name without "NVIDIA" and "GeForce".
        sm: Its compute capability, such as "8.9".
        memory: The sizes of its memory in GB. Jetson and GB10 share it with the processor.
        kind: Where it is found.
        names: Other names of it.
        machine: The processor that it is sold with, in one module; None for a card, which goes into machines of either kind.
    """

    name: str
    sm: str
    memory: tuple[int, ...]
    kind: Kind
    names: tuple[str, ...] = ()
    machine: Machine | None = None


def _series(
    kind: Kind, sm: str, *cards: tuple[str, int | tuple[int, ...]], machine: Machine | None = None
) -> tuple[Gpu, ...]:
    """Return cards of one kind and one compute capability."""
    return tuple(
        Gpu(name, sm, (memory,) if isinstance(memory, int) else memory, kind, machine=machine) for name, memory in cards
    )


GPUS: tuple[Gpu, ...] = (
    # Turing and Volta: refused with the reason, so that nobody looks for them in vain.
    *_series("server", "7.0", ("V100", (16, 32))),
    *_series("server", "7.5", ("T4", 16)),
    *_series(
        "desktop", "7.5",
        ("GTX 1660", 6), ("RTX 2060", (6, 12)), ("RTX 2070", 8), ("RTX 2080", 8), ("RTX 2080 Ti", 11),
    ),
    # Ampere
    *_series(
        "desktop", "8.6",
        ("RTX 3050", (6, 8)), ("RTX 3060", (8, 12)), ("RTX 3060 Ti", 8), ("RTX 3070", 8), ("RTX 3070 Ti", 8),
        ("RTX 3080", (10, 12)), ("RTX 3080 Ti", 12), ("RTX 3090", 24), ("RTX 3090 Ti", 24),
    ),
    *_series(
        "laptop", "8.6",
        ("RTX 3050 Laptop", (4, 6)), ("RTX 3050 Ti Laptop", 4), ("RTX 3060 Laptop", 6), ("RTX 3070 Laptop", 8),
        ("RTX 3070 Ti Laptop", 8), ("RTX 3080 Laptop", (8, 16)), ("RTX 3080 Ti Laptop", 16),
    ),
    *_series(
        "workstation", "8.6",
        ("RTX A2000", (6, 12)), ("RTX A4000", 16), ("RTX A4500", 20), ("RTX A5000", 24), ("RTX A5500", 24), ("RTX A6000", 48),
    ),
    *_series("server", "8.0", ("A100", (40, 80)), ("A30", 24)),
    *_series("server", "8.6", ("A2", 16), ("A10", 24), ("A10G", 24), ("A16", 16), ("A40", 48)),
    # Ada
    *_series(
        "desktop", "8.9",
        ("RTX 4060", 8), ("RTX 4060 Ti", (8, 16)), ("RTX 4070", 12), ("RTX 4070 SUPER", 12), ("RTX 4070 Ti", 12),
        ("RTX 4070 Ti SUPER", 16), ("RTX 4080", 16), ("RTX 4080 SUPER", 16), ("RTX 4090", 24), ("RTX 4090 D", 24),
    ),
    *_series(
        "laptop", "8.9",
        ("RTX 4050 Laptop", 6), ("RTX 4060 Laptop", 8), ("RTX 4070 Laptop", 8), ("RTX 4080 Laptop", 12),
        ("RTX 4090 Laptop", 16),
    ),
    *_series(
        "workstation", "8.9",
        ("RTX 2000 Ada", 16), ("RTX 4000 Ada", 20), ("RTX 4500 Ada", 24), ("RTX 5000 Ada", 32), ("RTX 6000 Ada", 48),
    ),
    *_series("server", "8.9", ("L4", 24), ("L20", 48), ("L40", 48), ("L40S", 48)),
    # Hopper
    *_series(
        "server", "9.0",
        ("H20", 96), ("H100", (80, 94)), ("H100 NVL", 94), ("H200", 141), ("H800", 80),
    ),
    *_series("server", "9.0", ("GH200", (96, 144)), machine="aarch64"),
    # Blackwell
    *_series(
        "desktop", "12.0",
        ("RTX 5050", 8), ("RTX 5060", 8), ("RTX 5060 Ti", (8, 16)), ("RTX 5070", 12), ("RTX 5070 Ti", 16),
        ("RTX 5080", 16), ("RTX 5090", 32), ("RTX 5090 D", 32),
    ),
    *_series(
        "laptop", "12.0",
        ("RTX 5050 Laptop", 8), ("RTX 5060 Laptop", 8), ("RTX 5070 Laptop", 8), ("RTX 5070 Ti Laptop", 12),
        ("RTX 5080 Laptop", 16), ("RTX 5090 Laptop", 24),
    ),
    *_series(
        "workstation", "12.0",
        ("RTX PRO 2000 Blackwell", 16), ("RTX PRO 4000 Blackwell", 24), ("RTX PRO 4500 Blackwell", 32),
        ("RTX PRO 5000 Blackwell", (48, 72)), ("RTX PRO 6000 Blackwell", 96),
    ),
    *_series("server", "10.0", ("B200", 180)),
    *_series("server", "10.0", ("GB200", 186), machine="aarch64"),
    *_series("server", "10.3", ("B300", 288)),
    *_series("server", "10.3", ("GB300", 288), machine="aarch64"),
    # With memory shared with the processor
    *_series("jetson", "8.7", ("Orin Nano", (4, 8)), ("Orin NX", (8, 16)), machine="aarch64"),
    Gpu("AGX Orin", "8.7", (32, 64), "jetson", ("Orin",), "aarch64"),
    *_series("jetson", "11.0", ("Thor T4000", 64), machine="aarch64"),
    Gpu("Thor T5000", "11.0", (128,), "jetson", ("Thor", "AGX Thor"), "aarch64"),
    Gpu("GB10", "12.1", (128,), "jetson", ("DGX Spark",), "aarch64"),
)  # fmt: skip


def machine_of(sm: str) -> Machine | None:
    """Return the processor that every GPU of a compute capability is sold with, or None where there are others.

    Args:
        sm: The compute capability, such as "8.7".
    """
    found = {gpu.machine for gpu in GPUS if gpu.sm == sm}
    return found.pop() if len(found) == 1 else None


def cards_with(sm: str, machine: Machine) -> list[str]:
    """Return the names of the GPUs of a compute capability that are sold with a processor.

    Args:
        sm: The compute capability, such as "9.0".
        machine: The processor.
    """
    return [gpu.name for gpu in GPUS if gpu.sm == sm and gpu.machine == machine]
