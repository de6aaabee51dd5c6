"""Which library computes a session's attention: the first that is right and faster on the session's own first layer.

16 bit, PyTorch's ``scaled_dot_product_attention``, is the floor. A library that is missing, too old, for other GPUs, that
fails, is wrong or is slower leads to the next one, with a line that says why.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dvdquant.errors import UnsupportedError
from dvdquant.ops.attention.libraries import LIBRARIES, REFERENCE, Library, check_library, ladder
from dvdquant.system.devices import wait_for

if TYPE_CHECKING:
    from dvdquant.ops.attention.libraries import Kernel

__all__ = ["MAX_ERROR", "MIN_TOKENS", "Attention", "rungs_for"]

log = logging.getLogger(__name__)

# The relative L2 distance from 16 bit up to which a library is taken. The formats are below 2 % on video models; a kernel
# that clips, or a scale that does not fit, is above 10 %.
MAX_ERROR = 0.05
# Shorter sequences stay in 16 bit. Their attention is a few percent of a step (its work grows with the square, that of the
# layers with the length itself), and rounding q, k and v takes as long as the faster products save.
MIN_TOKENS = 2048
_ROUNDS = 3


@dataclass
class Attention:
    """The attention of one session. It chooses at its first call, and stays with what it chose.

    Args:
        wanted: The recipe's format, ``int8`` or ``fp8``.
        rungs: The libraries that are tried, best first.
        sm: The compute capability times 10, or None for a CPU.
        must_be_faster: Whether a library has to be faster than 16 bit. One that was asked for by name has not.
        name: What the log calls the model.
        decided: Whether the first call has been.
        taken: The library that runs; None is 16 bit, and before the first call.
        error: Its relative L2 distance from 16 bit on the first layer.
        speedup: The time of 16 bit over its time, there.
        passed_over: A library and the reason, for each that was not taken.
    """

    wanted: str
    rungs: Sequence[Library]
    sm: int | None = None
    must_be_faster: bool = True
    name: str = "transformer"
    decided: bool = False
    taken: Library | None = None
    error: float | None = None
    speedup: float | None = None
    passed_over: list[tuple[str, str]] = field(default_factory=list)
    _kernel: Kernel | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
        """Return attention.

        Args:
            q: [B, S, H, d], and k and v [B, T, H, d], in 16 bit (fp32 on a CPU).
            k: See q.
            v: See q.
            scale: What scores are multiplied by.
            bounds: fp32 [2], the largest values that q and k can have, or None.

        Returns:
            [B, S, H, d].
        """
        if not self.decided:
            with self._lock:
                if not self.decided:
                    self._choose(q, k, v, scale, bounds)
        if self._kernel is None:
            return exact(q, k, v, scale)
        return self._kernel(q, k, v, scale, bounds)

    @property
    def takes_codes(self) -> bool:
        """Return whether the library that was chosen takes q and k as e4m3 codes of rotated heads."""
        return self.taken is not None and self.taken.codes

    def to_json(self) -> dict[str, Any]:
        """Return what was wanted and what runs, for the trace."""
        return {
            "wanted": self.wanted,
            "decided": self.decided,
            "library": self.taken.name if self.taken else None,
            "format": self.taken.kind if self.taken else "16",
            "error": self.error,
            "speedup": self.speedup,
            "passed_over": [{"library": name, "reason": reason} for name, reason in self.passed_over],
        }

    def words(self) -> str:
        """Return what runs in one line."""
        if not self.decided:
            return f"{self.wanted} is wanted; no sequence of {MIN_TOKENS} tokens has come yet"
        if self.taken is None:
            return f"16 bit, not {self.wanted}: " + (
                "; ".join(f"{name}: {reason}" for name, reason in self.passed_over) or "no library has it here"
            )
        return (
            f"{self.taken.name} ({self.taken.kind}), {100 * (self.error or 0):.2g} % from 16 bit and "
            f"{self.speedup or 0:.2f} times as fast on the first layer"
        )

    def _choose(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> None:
        exact_output: Tensor | None = None
        exact_seconds = 0.0
        for library in self.rungs:
            reason = library.refused(self.sm, q.shape[-1])
            if reason is None:
                if exact_output is None:  # where this does not fit, no step does
                    exact_output = exact(q, k, v, scale)
                    exact_seconds = seconds(lambda: exact(q, k, v, scale), q.device)
                try:
                    kernel = library.load()
                    reason = self._tested(library, kernel, (q, k, v, scale, bounds), exact_output, exact_seconds)
                except Exception as error:  # noqa: BLE001 - a library that fails is not taken, whatever it raises
                    reason = f"it fails: {type(error).__name__}: {str(error).strip():.200}"
            if reason is None:
                break
            self.passed_over.append((library.name, reason))
            log.info("%s: attention not by %s: %s", self.name, library.name, reason)
        self.decided = True
        log.log(
            logging.INFO if self.taken else logging.WARNING,
            "%s: attention of long sequences: %s",
            self.name,
            self.words(),
        )

    def _tested(
        self,
        library: Library,
        kernel: Kernel,
        operands: tuple[Tensor, Tensor, Tensor, float, Tensor | None],
        exact_output: Tensor,
        exact_seconds: float,
    ) -> str | None:
        """Take the library if it is right and faster; else return why not."""
        q = operands[0]
        output = kernel(*operands)
        if output.shape != q.shape or output.dtype != q.dtype:
            return f"it gives {tuple(output.shape)} {output.dtype} instead of {tuple(q.shape)} {q.dtype}"
        error = attention_error(output, exact_output)
        # Not "error > MAX_ERROR": a NaN is an error too.
        if not error <= MAX_ERROR:
            return f"it is {100 * error:.3g} % from 16 bit on the first layer, of at most {100 * MAX_ERROR:g} %"
        speedup = exact_seconds / max(seconds(lambda: kernel(*operands), q.device), 1e-9)
        if self.must_be_faster and speedup <= 1.0:
            return f"it takes {1 / max(speedup, 1e-9):.2f} times as long as 16 bit on the first layer"
        self.error, self.speedup, self.taken, self._kernel = error, speedup, library, kernel
        return None


def rungs_for(wanted: str, sm: int | None, backend: str | None) -> tuple[Library, ...]:
    """Return the libraries to try, best first.

    Args:
        wanted: ``int8`` or ``fp8``.
        sm: The compute capability times 10, or None for a CPU.
        backend: The name of one of :data:`LIBRARIES`, or ``reference``; None tries those of the SM.

    Raises:
        UnsupportedError: There is no such library, or it cannot serve the device.
    """
    if backend is None:
        return ladder(wanted, sm)
    check_library(backend)
    known = {**LIBRARIES, "reference": REFERENCE[wanted]}
    reason = known[backend].refused(sm)
    if reason is not None:
        raise UnsupportedError(
            f"attention by {backend} is not possible: {reason}",
            available=[name for name, library in known.items() if library.refused(sm) is None],
            fix="leave the library out, so that what is there is tried",
        )
    return (known[backend],)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return attention in 16 bit: q [B, S, H, d], k and v [B, T, H, d], to [B, S, H, d].

    Args:
        q: The queries, [B, S, H, d].
        k: The keys, [B, T, H, d].
        v: The values, [B, T, H, d].
        scale: The factor of the scores, usually 1/√d.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def attention_error(y: Tensor, exact_y: Tensor) -> float:
    """Return ``‖y − exact‖ / ‖exact‖`` of [B, S, H, d], head by head, so that no copy of all is made in fp32.

    Where the exact result is zero, any difference is a large error.

    Args:
        y: The result, [B, S, H, d].
        exact_y: The result in 16 bit, of the same shape.
    """
    difference = y.new_zeros((), dtype=torch.float64)
    size = difference.clone()
    for head in range(y.shape[2]):
        wanted = exact_y[:, :, head].float()
        difference += (y[:, :, head].float() - wanted).square().sum(dtype=torch.float64)
        size += wanted.square().sum(dtype=torch.float64)
    return float((difference / size.clamp(min=1e-30)).sqrt())


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of a few calls; the caller has made one before, which compiles what there is to compile.

    Args:
        call: What is timed.
        device: The device that PyTorch runs on.
    """
    times = []
    for _ in range(_ROUNDS):
        wait_for(device)
        started = time.perf_counter()
        call()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return min(times)
