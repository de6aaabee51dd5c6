"""Which library computes a session's attention: the first that is right and faster on the session's own first layer.

16 bit, PyTorch's ``scaled_dot_product_attention``, is the floor. A library that is missing, too old, for other GPUs, that
fails, is wrong or is slower leads to the next one, with a line that says why. So does one that was taken and fails later, as at
a shape that it has no kernel for.

A session that shares a clip with another one does not choose: it follows that one (:meth:`Attention.follow`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dvdquant.errors import ChoiceError
from dvdquant.ops.attention.libraries import Library, ladder, library_for
from dvdquant.system.devices import wait_for
from dvdquant.system.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from dvdquant.ops.attention.libraries import Kernel

__all__ = ["MAX_ERROR", "MIN_TOKENS", "SIXTEEN", "Attention", "AttentionReport", "rungs_for"]

log = logging.getLogger(__name__)

# The relative L2 distance from 16 bit up to which a library is taken. The formats are below 2 % on video models; a kernel
# that clips, or a scale that does not fit, is above 10 %.
MAX_ERROR = 0.05
# Shorter sequences stay in 16 bit. Their attention is a few percent of a step (its work grows with the square, that of the
# layers with the length itself), and rounding q, k and v takes as long as the faster products save.
MIN_TOKENS = 2048
_ROUNDS = 3
# What a session has chosen that no library suits.
SIXTEEN = "16"


class AttentionReport(Protocol):
    """The report of a session about its attention, in whichever process it runs."""

    @property
    def wanted(self) -> str:
        """Return the recipe's format, ``int8`` or ``fp8``."""

    @property
    def choice(self) -> str | None:
        """Return the name of the library that runs, :data:`SIXTEEN`, or None before the first call."""

    def to_json(self) -> dict[str, Any]:
        """Return what was wanted and what runs, for the trace."""


@dataclass
class Attention:
    """The attention of one session. It chooses at its first call, and stays with what it chose as long as that does not fail.

    Args:
        wanted: The recipe's format, ``int8`` or ``fp8``.
        rungs: The libraries that are tried, best first.
        sm: The compute capability times 10, or None for a CPU.
        must_be_faster: Whether a library has to be faster than 16 bit. One that was asked for by name has not.
        name: What the log calls the model.
        decided: Whether the first call has been.
        taken: The library that runs; None is 16 bit, and before the first call.
        error: Its relative L2 distance from 16 bit on the first layer.
        speedup: The time of 16 bit over its time, there; None where another session has chosen.
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
    _follows: bool = False
    _lead: str | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
        """Return softmax(scale · q kᵀ) v, by the library that the first call chooses.

        Args:
            q: [B, S, H, d] in 16 bit (fp32 on a CPU).
            k: [B, T, H, d] of the dtype of q.
            v: [B, T, H, d] of the dtype of q.
            scale: The factor of the scores.
            bounds: fp32 [2], the largest values that q and k can have, or None.

        Returns:
            [B, S, H, d].

        Raises:
            ChoiceError: It cannot follow another session.
        """
        while True:
            if not self.decided:
                with self._lock:
                    if not self.decided:
                        self._choose(q, k, v, scale, bounds)
            kernel = self._kernel
            if kernel is None:
                return exact(q, k, v, scale)
            out = self._attempt(kernel, q, k, v, scale, bounds)
            if out is not None:
                return out

    def of_codes(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor) -> Tensor | None:
        """Return attention of q and k as e4m3 codes of rotated heads, or None where the library that took them is none any more.

        Args:
            q: Codes, float8_e4m3fn [B, S, H, d].
            k: Codes, float8_e4m3fn [B, T, H, d].
            v: [B, T, H, d] in 16 bit.
            scale: The factor of the scores.
            bounds: The values that the largest codes of q and k stand for, fp32 [2].
        """
        kernel = self._kernel
        return self._attempt(kernel, q, k, v, scale, bounds) if kernel is not None and self.takes_codes else None

    def _attempt(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None
    ) -> Tensor | None:
        """Return what a library computes, or None where it fails and is not asked again. Want of memory stays an error."""
        try:
            return kernel(q, k, v, scale, bounds)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"it fails at {list(q.shape)}: {_error_text(error)}"
        with self._lock:
            if self._kernel is kernel and self.taken is not None:
                log.warning("%s: attention no longer by %s: %s", self.name, self.taken.name, reason)
                self.passed_over.append((self.taken.name, reason))
                self.rungs = self.rungs[self.rungs.index(self.taken) + 1 :]
                self._forget()
        return None

    def _forget(self) -> None:
        """Forget what was chosen, so that the next call chooses."""
        self.decided, self.taken, self._kernel, self.error, self.speedup = False, None, None, None, None

    def follow(self, choice: str | None) -> None:
        """Compute by what another session has chosen from now on, and by nothing else.

        Two sessions that choose each for itself may choose differently, as the time of a library decides.

        Args:
            choice: The other session's :attr:`choice`. Before it has chosen, this one cannot compute attention.
        """
        with self._lock:
            if not self._follows or choice != self._lead:
                self._follows, self._lead = True, choice
                self._forget()

    @property
    def choice(self) -> str | None:
        """Return the name of the library that runs, :data:`SIXTEEN`, or None before the first call."""
        if not self.decided:
            return None
        return SIXTEEN if self.taken is None else self.taken.name

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
            "format": self.taken.kind if self.taken else SIXTEEN,
            "error": self.error,
            "speedup": self.speedup,
            "passed_over": [{"library": name, "reason": reason} for name, reason in self.passed_over],
        }

    def words(self) -> str:
        """Return what runs in one line."""
        if not self.decided:
            return f"{self.wanted} is wanted; no sequence of {MIN_TOKENS} tokens has come yet"
        if self.taken is None and self._follows:
            return "16 bit, as the first session"
        if self.taken is None:
            return f"16 bit, not {self.wanted}: " + (
                "; ".join(f"{name}: {reason}" for name, reason in self.passed_over) or "no library has it here"
            )
        runs = f"{self.taken.name} ({self.taken.kind}), {100 * (self.error or 0):.2g} % from 16 bit"
        if self.speedup is None:
            return f"{runs} on the first layer, as the first session"
        return f"{runs} and {self.speedup:.2f} times as fast on the first layer"

    def _choose(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> None:
        if self._follows:
            self._choose_as_the_other(q, k, v, scale, bounds)
            return
        exact_output: Tensor | None = None
        exact_seconds = 0.0
        for library in self.rungs:
            reason = library.refused(self.sm, q.shape[-1])
            if reason is None:
                if exact_output is None:  # where this does not fit, no step does
                    exact_output = exact(q, k, v, scale)
                    exact_seconds = seconds(lambda: exact(q, k, v, scale), q.device)
                reason = self._tested(library, (q, k, v, scale, bounds), exact_output, exact_seconds)
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

    def _choose_as_the_other(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> None:
        """Take the library of the session that is followed, if it is right here, too.

        Raises:
            ChoiceError: It is not, or that session has not chosen yet.
        """
        reason = self._take_the_lead(q, k, v, scale, bounds)
        if reason is not None:
            raise ChoiceError(
                f"{self.name} cannot compute attention as the first session does: {reason}",
                fix="give both devices the same libraries, or ask for --attention 16",
            )
        self.decided = True
        log.info("%s: attention of long sequences: %s", self.name, self.words())

    def _take_the_lead(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> str | None:
        """Take the library that the other session has taken; return why that is not possible."""
        if self._lead is None:
            return "the first session has not chosen yet"
        if self._lead == SIXTEEN:
            return None
        library = next((rung for rung in self.rungs if rung.name == self._lead), None)
        if library is None:
            failed = [why for name, why in self.passed_over if name == self._lead]
            return failed[-1] if failed else f"{self._lead} is none of its libraries"
        reason = library.refused(self.sm, q.shape[-1])
        if reason is not None:
            return reason
        return self._tested(library, (q, k, v, scale, bounds), exact(q, k, v, scale), None)

    def _tested(
        self,
        library: Library,
        operands: tuple[Tensor, Tensor, Tensor, float, Tensor | None],
        exact_output: Tensor,
        exact_seconds: float | None,
    ) -> str | None:
        """Take the library if it is right and faster (without the time of 16 bit: if it is right); else return why not."""
        try:
            return self._compared(library, library.load(), operands, exact_output, exact_seconds)
        except Exception as error:  # noqa: BLE001 - a library that fails is not taken, whatever it raises
            return f"it fails: {_error_text(error)}"

    def _compared(
        self,
        library: Library,
        kernel: Kernel,
        operands: tuple[Tensor, Tensor, Tensor, float, Tensor | None],
        exact_output: Tensor,
        exact_seconds: float | None,
    ) -> str | None:
        """See :meth:`_tested`; whatever the library raises comes through."""
        q = operands[0]
        output = kernel(*operands)
        if output.shape != q.shape or output.dtype != q.dtype:
            return f"it gives {tuple(output.shape)} {output.dtype} instead of {tuple(q.shape)} {q.dtype}"
        error = attention_error(output, exact_output)
        # Not "error > MAX_ERROR": a NaN is an error too.
        if not error <= MAX_ERROR:
            return f"it is {100 * error:.3g} % from 16 bit on the first layer, of at most {100 * MAX_ERROR:g} %"
        speedup = None
        if exact_seconds is not None:
            speedup = exact_seconds / max(seconds(lambda: kernel(*operands), q.device), 1e-9)
        if self.must_be_faster and speedup is not None and speedup <= 1.0:
            return f"it takes {1 / max(speedup, 1e-9):.2f} times as long as 16 bit on the first layer"
        self.error, self.speedup, self.taken, self._kernel = error, speedup, library, kernel
        return None


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip():.200}"


def rungs_for(wanted: str, sm: int | None, backend: str | None) -> tuple[Library, ...]:
    """Return the libraries to try, best first.

    Args:
        wanted: ``int8`` or ``fp8``.
        sm: The compute capability times 10, or None for a CPU.
        backend: The name of one of :data:`.libraries.LIBRARIES`, or ``reference``; None tries those of the SM.

    Raises:
        UnsupportedError: There is no such library, or it cannot serve the device.
    """
    if backend is None:
        return ladder(wanted, sm)
    return (library_for(wanted, sm, backend),)


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
