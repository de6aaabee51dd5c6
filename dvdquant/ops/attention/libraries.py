"""Libraries with kernels for 8-bit attention: on which GPUs each has them, and how it is called.

No library is imported before a session wants it, and none is needed: without them attention is in 16 bit. A library is
taken by its name and version here; whether its kernel is right and faster, the session's own first layer shows
(:mod:`dvdquant.ops.attention.ladder`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from dvdquant.errors import UnsupportedError
from dvdquant.hardware.capabilities import CAPABILITIES, sm_number
from dvdquant.recipe import ATTENTION

if TYPE_CHECKING:
    from torch import Tensor

    # q, k, v [B, S, H, d], the scale of scores, the largest values of q and k (or None) -> [B, S, H, d].
    Kernel = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]

__all__ = [
    "LADDERS",
    "LIBRARIES",
    "REFERENCE",
    "Library",
    "cards_text",
    "check_library",
    "ladder",
    "ladder_rows",
    "ladders_text",
    "library_for",
    "refuse_library_in_16_bit",
]


@dataclass(frozen=True)
class Library:
    """One way to compute attention in 8 bits.

    Args:
        name: What it is called by users.
        kind: The format that it computes, of :data:`.definition.FORMATS`, as near as it is known.
        package: The distribution whose version is looked at, or an empty text.
        least: The oldest version that has what is called.
        below: The first later version that has another interface, which is not taken; None where none is known.
        sms: The SMs that it has kernels for, or None for all devices.
        max_head: The most channels of a head.
        load: Import the library and return its kernel.
        codes: Whether its kernel also takes q and k as e4m3 codes of rotated heads, by their bounds.
    """

    name: str
    kind: str
    package: str
    least: tuple[int, ...]
    below: tuple[int, ...] | None
    sms: frozenset[int] | None
    max_head: int
    load: Callable[[], Kernel]
    codes: bool = False

    def refused(self, sm: int | None, head: int | None = None) -> str | None:
        """Return in words why the library cannot serve a device, or None. It imports nothing.

        Args:
            sm: The compute capability times 10, or None for a CPU.
            head: The channels of a head, if they are known.
        """
        if self.sms is not None and sm is None:
            return "it needs a CUDA device"
        if self.sms is not None and sm not in self.sms:
            return f"it has no kernels for SM {(sm or 0) / 10}"
        if head is not None and head > self.max_head:
            return f"it takes heads of at most {self.max_head} channels, not {head}"
        return self.installed()

    def installed(self) -> str | None:
        """Return in words why the library is not there in a version that is known, or None."""
        if not self.package:
            return None
        try:
            version = metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return f"{self.package} is not installed"
        numbers = _numbers(version)
        if numbers < self.least:
            return f"{self.package} {version} is too old, it needs {'.'.join(map(str, self.least))}"
        if self.below is not None and numbers >= self.below:
            return (
                f"{self.package} {version} has another interface, it needs one below {'.'.join(map(str, self.below))}"
            )
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version; what is no number ends them."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _comfy_kitchen() -> Kernel:
    library: Any = importlib.import_module("comfy_kitchen")
    attention = library.int8_attention

    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
        out: Tensor = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return out.transpose(1, 2)

    return kernel


def _sageattention_2() -> Kernel:
    library: Any = importlib.import_module("sageattention")
    attention = library.sageattn

    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
        out: Tensor = attention(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale)
        return out

    return kernel


def _sageattention_1() -> Kernel:
    library: Any = importlib.import_module("sageattention")
    attention = library.sageattn

    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
        # Itself it would subtract the mean from the caller's k, in place.
        k = k - k.mean(1, keepdim=True)
        out: Tensor = attention(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale, smooth_k=False)
        return out

    return kernel


def _fa3_fwd() -> Kernel:
    import torch

    from dvdquant.ops.attention.e4m3 import e4m3_operands

    library: Any = importlib.import_module("fa3_fwd_interface")
    attention = library.flash_attn_func

    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
        codes, steps = e4m3_operands(q, k, v, bounds)
        batch, heads = q.shape[0], q.shape[2]
        q_step, k_step, v_step = (step.to(torch.float32).expand(batch, heads).contiguous() for step in steps)
        out = attention(*codes, softmax_scale=scale, q_descale=q_step, k_descale=k_step, v_descale=v_step)
        out = out[0] if isinstance(out, tuple) else out
        return out.to(v.dtype)  # type: ignore[no-any-return]

    return kernel


def _cudnn() -> Kernel:
    from dvdquant.ops.attention.cudnn_fp8 import CudnnAttention

    return CudnnAttention()


def _reference(name: str) -> Callable[[], Kernel]:
    def load() -> Kernel:
        from torch import float8_e4m3fn

        from dvdquant.numerics.dtypes import E4M3_MAX
        from dvdquant.ops.attention.definition import FORMATS, quantized_attention

        def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
            form, dtype = FORMATS[name], v.dtype
            if q.dtype == float8_e4m3fn and bounds is not None:
                # Of rotated heads: what the codes say is on the grid already.
                q, k = (x.float() * (bound / E4M3_MAX) for x, bound in zip((q, k), bounds.float()))
                form = replace(form, rotated=False)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return quantized_attention(q, k, v, form, bounds, scale).transpose(1, 2).to(dtype)

        return kernel

    return load


_COMFY = Library(
    "comfy-kitchen", "int8", "comfy-kitchen", (0, 2, 40), None,
    frozenset((75, 80, 86, 89, 90, 100, 120)), 256, _comfy_kitchen,
)  # fmt: skip
_SAGE2 = Library(
    "sageattention-2", "int8-fp8", "sageattention", (2, 2), None,
    frozenset((80, 86, 89, 90, 120)), 128, _sageattention_2,
)  # fmt: skip
_SAGE1 = Library(
    "sageattention-1", "int8", "sageattention", (1, 0, 6), (2,), frozenset((80, 86, 89)), 128, _sageattention_1
)
_FA3 = Library("fa3-fwd", "fp8", "fa3-fwd", (0, 0, 3), None, frozenset((90,)), 192, _fa3_fwd, True)
# The engine for SM 12.0 is an experiment of the frontend that has to be switched on.
_CUDNN = Library(
    "cudnn", "fp8", "nvidia-cudnn-frontend", (1, 32), None, frozenset((90, 100, 103)), 128, _cudnn, True
)  # fmt: skip

# The definition itself. It is slow, and taken only where it is asked for by name.
REFERENCE: dict[str, Library] = {
    kind: Library("reference", kind, "", (), None, None, 1 << 16, _reference(kind), kind == "fp8")
    for kind in ("int8", "fp8")
}
LIBRARIES: dict[str, Library] = {library.name: library for library in (_COMFY, _SAGE2, _SAGE1, _FA3, _CUDNN)}

# What is tried on an SM, best first. Where no library has the recipe's own format, the other one is tried: the self-test
# says how far it is from 16 bit, and the trace which one ran.
LADDERS: dict[int, dict[str, tuple[Library, ...]]] = {
    80: {"int8": (_COMFY, _SAGE2, _SAGE1), "fp8": (_COMFY, _SAGE2, _SAGE1)},
    86: {"int8": (_COMFY, _SAGE2, _SAGE1), "fp8": (_COMFY, _SAGE2, _SAGE1)},
    89: {"int8": (_SAGE2, _COMFY, _SAGE1), "fp8": (_SAGE2, _COMFY, _SAGE1)},
    90: {"int8": (_SAGE2, _FA3, _CUDNN, _COMFY), "fp8": (_FA3, _CUDNN, _SAGE2, _COMFY)},
    100: {"int8": (_CUDNN, _COMFY), "fp8": (_CUDNN, _COMFY)},
    103: {"int8": (_CUDNN,), "fp8": (_CUDNN,)},
    120: {"int8": (_COMFY, _SAGE2), "fp8": (_COMFY, _SAGE2)},
}


def check_library(name: str) -> None:
    """Refuse a name that no library of attention has. Nothing is imported for it.

    Args:
        name: What was asked for.

    Raises:
        UnsupportedError: There is no such library.
    """
    known = (*LIBRARIES, "reference")
    if name not in known:
        raise UnsupportedError(
            f"unknown attention library {name!r:.100}", available=known, fix="pick one, or leave it out"
        )


def library_for(wanted: str, sm: int | None, name: str) -> Library:
    """Return a library that was asked for by name. It is not imported.

    Args:
        wanted: ``int8`` or ``fp8``.
        sm: The compute capability times 10, or None for a CPU.
        name: The name of one of :data:`LIBRARIES`, or ``reference``.

    Raises:
        UnsupportedError: There is no such library, or it cannot serve the device.
    """
    check_library(name)
    known = {**LIBRARIES, "reference": REFERENCE[wanted]}
    reason = known[name].refused(sm)
    if reason is not None:
        raise UnsupportedError(
            f"attention by {name} is not possible: {reason}",
            available=[each for each, library in known.items() if library.refused(sm) is None],
            fix="leave the library out, so that what is there is tried",
        )
    return known[name]


def refuse_library_in_16_bit(wanted: str, library: str | None) -> None:
    """Refuse a library for attention in 16 bit, which none of them computes.

    Args:
        wanted: What was asked for, or else the recipe's attention: ``16``, ``int8`` or ``fp8``.
        library: The library that was asked for, or None.

    Raises:
        UnsupportedError: A library was asked for, and attention is in 16 bit.
    """
    if wanted == "16" and library is not None:
        raise UnsupportedError(
            f"{library!r:.100} computes 8-bit attention, and attention is in 16 bit here",
            available=ATTENTION[1:],
            fix="ask for int8 or fp8 attention too, or leave the library out",
        )


def ladder(wanted: str, sm: int | None) -> tuple[Library, ...]:
    """Return the libraries that are tried on a device, best first.

    Args:
        wanted: ``int8`` or ``fp8``.
        sm: The compute capability times 10, or None for a CPU.
    """
    return LADDERS.get(sm or 0, {}).get(wanted, ())


def ladder_rows() -> list[tuple[list[str], dict[str, tuple[Library, ...]]]]:
    """Return the SMs that our kernels are built for or a library has, grouped by what is tried on them, as pages list them.

    Returns:
        For each group its SMs, such as "8.9", and the libraries by format, best first; last those that no library has.
    """
    none: dict[str, tuple[Library, ...]] = {"int8": (), "fp8": ()}
    rows: list[tuple[list[str], dict[str, tuple[Library, ...]]]] = []
    ours = {sm_number(sm) for sm, facts in CAPABILITIES.items() if facts.kernels and not facts.refused}
    for sm in (*LADDERS, *sorted(ours - LADDERS.keys())):
        formats = LADDERS.get(sm, none)
        same = next((sms for sms, known in rows if known == formats), None)
        if same is None:
            rows.append(([f"{sm / 10}"], formats))
        else:
            same.append(f"{sm / 10}")
    return rows


def cards_text(wanted: str) -> list[str]:
    """Return in words which libraries are tried on which cards: a text for each group of SMs.

    Args:
        wanted: ``int8`` or ``fp8``.
    """
    found = []
    for sms, formats in ladder_rows():
        cards = ", ".join(f"{sm} ({CAPABILITIES[sm].cards})" for sm in sms)
        found.append(f"SM {cards}: {', '.join(library.name for library in formats[wanted]) or 'none, so 16 bit'}")
    return found


def ladders_text(wanted: str) -> list[str]:
    """Return in words what PyTorch sessions try on each card, for people who ask before one runs.

    Args:
        wanted: The recipe's attention: ``16``, ``int8`` or ``fp8``.

    Returns:
        A line, and one for each group of SMs; nothing for 16.
    """
    if wanted == "16":
        return []
    lines = [
        f"attention of long sequences in PyTorch sessions: {wanted}, by the first library that is right and faster than 16 "
        "bit on the first layer, else 16 bit"
    ]
    lines += [f"  {words}" for words in cards_text(wanted)]
    there = [library.name for library in LIBRARIES.values() if library.installed() is None]
    return [*lines, f"  installed here: {', '.join(there) or 'none'}"]
