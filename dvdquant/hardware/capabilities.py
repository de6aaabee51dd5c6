"""What each compute capability executes, and what 4-bit activations gain there.

These are facts of what dvdquant builds and runs, in one place without PyTorch. Tests hold them against the exporter's tables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dvdquant.errors import UnsupportedError

__all__ = ["CAPABILITIES", "JETSONS", "Capability", "capability", "parse_sm", "sm_number"]


@dataclass(frozen=True)
class Capability:
    """A compute capability.

    Args:
        sm: The number, such as "8.9".
        cards: The series that have it, in short.
        rtx: TensorRT-RTX engines are built for it.
        rtx_listed: NVIDIA's support matrix of TensorRT-RTX (1.0 to 1.5) names it.
        rtx_a4: What an a4 engine runs on, where it gains over a8; "" where it executes what a8 does.
        kernels: Our CUDA kernels are built for it, for PyTorch sessions and the TensorRT plugin.
        kernels_a4: What a4 runs on in our kernels, where it gains over a8.
        measured: What was measured on it; "" where nothing has run.
        refused: Why nothing is offered for it.
    """

    sm: str
    cards: str
    rtx: bool = False
    rtx_listed: bool = True
    rtx_a4: str = ""
    kernels: bool = True
    kernels_a4: str = ""
    measured: str = ""
    refused: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the targets that make something which runs on it, the best known first."""
        if self.refused:
            return ()
        engines = ("rtx",) if self.rtx else ()
        kernels = ("graphs", "tensorrt") if self.kernels else ()
        return engines + kernels if self.rtx_listed else kernels + engines

    def gain(self, target: str) -> str:
        """Return the units on which a4 gains over a8, or "" where it gains neither time nor memory.

        Args:
            target: ``rtx``, ``tensorrt``, ``graphs`` or ``onnx``.
        """
        return self.rtx_a4 if target == "rtx" else self.kernels_a4


_S4 = "4-bit integer tensor cores"
_FP4 = "FP4 tensor cores (NVFP4)"
_H100 = (
    "one H100: quantized layers 1.6 to 1.9 times as fast as bf16; a step of Wan2.1 at 480p, against bf16 that is not compiled, "
    "1.03 (1.3B) and 1.11 (14B) times"
)

CAPABILITIES: dict[str, Capability] = {
    each.sm: each
    for each in (
        Capability("7.0", "V100", kernels=False, refused="it has neither bf16 nor INT8 tensor cores"),
        Capability(
            "7.5", "T4, RTX 20, GTX 16", kernels=False, refused="it has no bf16, and TensorRT-RTX has no INT4 there"
        ),
        Capability("8.0", "A100, A30", rtx=True, rtx_listed=False, kernels_a4=_S4),
        Capability("8.6", "RTX 30, RTX A, A10, A40", rtx=True, kernels_a4=_S4),
        Capability("8.7", "Jetson Orin", kernels_a4=_S4),
        Capability("8.9", "RTX 40, RTX Ada, L4, L40S", rtx=True, kernels_a4=_S4),
        Capability("9.0", "H100, H200, GH200", measured=_H100),
        Capability("10.0", "B200, GB200"),
        Capability("10.3", "B300, GB300"),
        Capability("11.0", "Jetson Thor"),
        Capability("12.0", "RTX 50, RTX PRO Blackwell", rtx=True, rtx_a4=_FP4),
        Capability("12.1", "GB10 (DGX Spark)", rtx=True, rtx_a4=_FP4),
    )
}

JETSONS = ("8.7", "11.0")
"""The compute capabilities of modules that share the processor's memory, and build their engines themselves."""

_SM = re.compile(r"(?:(?:sm|compute)[_ -]?)?(\d{1,2})[._]?(\d)[af]?", re.ASCII | re.IGNORECASE)


def parse_sm(text: str) -> str:
    """Return a compute capability in the form "8.9".

    Args:
        text: ``8.9``, ``89``, ``sm_89``, ``sm89`` or ``sm_90a``.

    Raises:
        UnsupportedError: It is none, or one that dvdquant has nothing for.
    """
    match = _SM.fullmatch(text.strip())
    sm = f"{match[1]}.{match[2]}" if match else text
    return capability(sm, text).sm


def sm_number(sm: str) -> int:
    """Return major · 10 + minor of a compute capability, as the kernel libraries number them.

    Args:
        sm: The compute capability, such as "8.7".
    """
    major, _, minor = sm.partition(".")
    return 10 * int(major) + int(minor)


def capability(sm: str, text: str = "") -> Capability:
    """Return what is known of a compute capability.

    Args:
        sm: The number, such as "8.9".
        text: How it was written, for the error.

    Raises:
        UnsupportedError: It is unknown, or nothing is offered for it; the error says why.
    """
    found = CAPABILITIES.get(sm)
    known = [each.sm for each in CAPABILITIES.values() if not each.refused]
    if found is None:
        raise UnsupportedError(
            f"there are no engines for SM {(text or sm)!r:.40}",
            available=known,
            fix="pick one with --sm, or name the card with --gpu; dvdq export --list-gpus has all of them",
        )
    if found.refused:
        raise UnsupportedError(
            f"nothing is offered for SM {sm}: {found.refused}",
            available=known,
            fix="use a card of one of these; dvdq export --list-gpus names them",
        )
    return found
