"""The place of a denoising loop, as far as its calls of the transformer show it.

Nobody tells the transformer where the loop is. So steps are counted here, for the whole runtime: a step begins when the
step index changes that the pipeline passes, or the timestep. Timesteps fall and steps rise within a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LoopPosition"]


@dataclass
class LoopPosition:
    """The step of a loop, and the calls of this step.

    Args:
        timestep: The timestep of the step, or None before the first call.
        index: The index of the step: the given one, or one that is counted here.
        given: The step index that the pipeline passed, or None.
        called: The branches of this step that were called. The caller of :meth:`move` or :meth:`name` fills it.
        before: The number of calls in the step before, or 0 in the first step.
    """

    timestep: float | None = None
    index: int = -1
    given: int | None = None
    called: list[str] = field(default_factory=list)
    before: int = 0

    def restarts(self, step: int | None, timestep: float) -> bool:
        """Return whether a call is of a later request, because its timestep rises or its step falls.

        Args:
            step: The step index that the call passes, or None.
            timestep: The timestep of the call.
        """
        if self.timestep is None:
            return False
        return timestep > self.timestep or (step is not None and step < self.index)

    def repeats(self, branch: str | None, step: int | None, timestep: float) -> bool:
        """Return whether a call begins the same step again, as the first call of a later request may.

        A request that an exception ended is not reported as ended. If it did not get beyond its first step, the next
        request begins at the same step, and a repeated branch shows this. Later in a request, the same branch at the
        same timestep is a step of its own, of a solver that evaluates one timestep twice.

        Args:
            branch: The branch that the call names, or None.
            step: The step index that the call passes, or None.
            timestep: The timestep of the call.
        """
        repeated = (step, timestep) == (self.given, self.timestep) and branch in self.called
        return repeated and (step is not None or self.index == 0)

    def at(self, step: int | None, timestep: float) -> bool:
        """Return whether a call is of the current step.

        Args:
            step: The step index that the call passes, or None.
            timestep: The timestep of the call.
        """
        return step == self.index if step is not None else timestep == self.timestep

    def enter(self, step: int | None, timestep: float) -> int:
        """Go to another step, and return its index.

        Args:
            step: The step index that the call passes, or None.
            timestep: The timestep of the call.
        """
        self.before = len(self.called)
        self.given, self.timestep, self.called = step, timestep, []
        self.index = self.index + 1 if step is None else step
        return self.index

    def name(self, branch: str | None) -> str:
        """Note a call of the current step, and return the name of its branch.

        Calls that name no branch are told apart by their order.

        Args:
            branch: The branch that the call names, or None.
        """
        name = f"call {len(self.called)}" if branch is None else branch
        self.called.append(name)
        return name

    def move(self, branch: str | None, step: int | None, timestep: float) -> tuple[str, int]:
        """Go to the step of a call. A branch that this step has had already begins another step.

        Args:
            branch: The branch that the call names, or None.
            step: The step index that the call passes, or None.
            timestep: The timestep of the call.

        Returns:
            The branch and the index of the step.
        """
        if (step, timestep) != (self.given, self.timestep) or branch in self.called:
            self.enter(step, timestep)
        return self.name(branch), self.index

    @property
    def unfinished(self) -> bool:
        """Return whether the current step has had fewer calls than the step before."""
        return len(self.called) < self.before
