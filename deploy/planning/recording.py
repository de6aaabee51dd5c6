"""What both engines say at every step of a few clips: the data that δ is planned from.

The clip itself is the high engine's, so that every step is recorded at the latents a good generation has; a switched one
would record the accident of its own decisions. But δ-GBS does not see the clean change of the model: between a 4-bit and an
8-bit output lies quantization noise, which on a small model is several times the change from step to step. So the low
engine runs beside, on the same inputs, and L1 is kept for all four pairs of engines of two adjacent steps. It also gives
both engines' times on this machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dvdquant.deploy.sessions.base import EngineSession, WrappedSession
from dvdquant.deploy.switching.gbs import relative_change
from dvdquant.deploy.switching.runner import TIMESTEP

__all__ = ["ClipRecording", "Recorder", "RecordingSession", "median_seconds"]


@dataclass
class ClipRecording:
    """One clip through one transformer.

    Args:
        prompt: The prompt.
        seed: The seed of the first noise.
        component: The transformer: ``transformer`` or ``transformer_2``.
        timesteps: The timesteps of its n steps.
        changes: L1(1), …, L1(n−1) of the first call in each step, by the bits of step t − 1 and of step t.
        seconds: The seconds of every call, by bits.
        calls: The calls of the transformer on the high engine, all branches of guidance.
    """

    prompt: str
    seed: int
    component: str
    timesteps: list[float] = field(default_factory=list)
    changes: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    calls: int = 0


class RecordingSession(WrappedSession):
    """A session that, between :meth:`begin` and :meth:`end`, records what its other engine would have said.

    The first call of a step is the branch that δ-GBS decides from (of a batch that is split, its first slice).
    """

    def __init__(self, inner: EngineSession, low: int, high: int) -> None:
        super().__init__(inner)
        self.low, self.high = low, high
        self._clip: ClipRecording | None = None
        self._last: dict[int, Tensor] = {}

    def begin(self, prompt: str, seed: int) -> None:
        """Record the clip that follows.

        Args:
            prompt: The prompt of the clip.
            seed: The seed of the clip.
        """
        self._clip, self._last = ClipRecording(prompt, seed, self.component), {}

    def end(self) -> ClipRecording | None:
        """Stop, and return the recording; None if this transformer was not called."""
        clip, self._clip, self._last = self._clip, None, {}
        return clip if clip is not None and clip.timesteps else None

    def run(self, inputs: Mapping[str, Tensor], bits: int) -> Tensor:
        """Run the session; while recording, the low engine runs too.

        Args:
            inputs: The inputs of the graph by name.
            bits: The bits of the activations.
        """
        if self._clip is None or bits != self.high:
            return self.inner.run(inputs, bits)
        clip, timestep = self._clip, float(inputs[TIMESTEP].max())
        output = self._timed(inputs, self.high)
        clip.calls += 1
        if not clip.timesteps or clip.timesteps[-1] != timestep:
            clip.timesteps.append(timestep)
            now = {self.high: output.clone(), self.low: self._timed(inputs, self.low)}
            for before, previous in self._last.items():
                for after, current in now.items():
                    clip.changes.setdefault((before, after), []).append(relative_change(current, previous))
            self._last = now
        return output

    def _timed(self, inputs: Mapping[str, Tensor], bits: int) -> Tensor:
        assert self._clip is not None
        started = time.perf_counter()
        output = self.inner.run(inputs, bits)
        if output.is_cuda:
            torch.cuda.current_stream(output.device).synchronize()
        self._clip.seconds.setdefault(bits, []).append(time.perf_counter() - started)
        return output


class Recorder:
    """Wraps every session of a generator, and records clip by clip.

    Args:
        low: The bits of the low engine.
        high: The bits of the high engine.
    """

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.sessions: list[RecordingSession] = []
        self._clip: tuple[str, int] | None = None

    def wrap(self, session: EngineSession) -> EngineSession:
        """Wrap a session, for ``open_generator(wrap_session=…)``; one that is opened during a clip records from there on.

        Args:
            session: The session that was opened.
        """
        self.sessions.append(RecordingSession(session, self.low, self.high))
        if self._clip is not None:
            self.sessions[-1].begin(*self._clip)
        return self.sessions[-1]

    def begin(self, prompt: str, seed: int) -> None:
        """Record the clip that follows.

        Args:
            prompt: The prompt of the clip.
            seed: The seed of the clip.
        """
        self._clip = prompt, seed
        for session in self.sessions:
            session.begin(prompt, seed)

    def end(self) -> list[ClipRecording]:
        """Stop, and return the recordings of the transformers that ran, in the order of their steps."""
        self._clip = None
        clips = [clip for session in self.sessions if (clip := session.end()) is not None]
        return sorted(clips, key=lambda clip: -clip.timesteps[0])


def median_seconds(clips: Sequence[ClipRecording]) -> dict[int, float]:
    """Return the seconds of one call by bits, the median over all clips.

    Args:
        clips: The recorded clips.
    """
    together: dict[int, list[float]] = {}
    for clip in clips:
        for bits, times in clip.seconds.items():
            together.setdefault(bits, []).extend(times)
    return {bits: statistics.median(times) for bits, times in together.items()}
