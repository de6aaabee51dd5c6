"""The names that others give the modules of a transformer, read in both directions.

A family's table stands once: the readers of files go from the authors' names to those of diffusers, the readers of LoRAs need
every name that a module of diffusers is known by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

__all__ = ["Names", "Stack"]


@dataclass(frozen=True)
class Stack:
    """The blocks of one kind.

    Args:
        theirs: The authors' name of the list, such as ``double_blocks``.
        ours: That of diffusers.
        modules: The authors' names inside of a block -> those of diffusers.
        joined: The authors' layers that are several of diffusers -> these, in the order of their rows.
    """

    theirs: str
    ours: str
    modules: Mapping[str, str]
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Names:
    """The names of one family.

    Args:
        modules: The authors' names outside of blocks -> those of diffusers.
        stacks: The blocks.
        spellings: How another tool calls a module, whole or inside of a block -> how its authors do.
        words: The authors' parts of a dotted name -> those of diffusers, for families that differ in these alone.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    spellings: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)

    def ours(self, module: str) -> tuple[str, ...]:
        """Return the modules of diffusers that one of another tool is, in the order of their rows; none where it is unknown.

        Args:
            module: The name of the module in the other naming.
        """
        for stack in self.stacks:
            if (found := _in_block(module, stack.theirs)) is not None:
                block, inner = found
                inner = self.spellings.get(inner, inner)
                parts = stack.joined.get(inner) or ((stack.modules[inner],) if inner in stack.modules else ())
                return tuple(f"{stack.ours}.{block}.{part}" for part in parts)
        known = self.modules.get(self.spellings.get(module, module))
        if known is not None:
            return (known,)
        changed = ".".join(self.words.get(part, part) for part in module.split("."))
        return (changed,) if changed != module else ()

    def theirs(self, module: str) -> Iterator[str]:
        """Yield every name that others give a module of diffusers, but for layers that are joined with others.

        Args:
            module: The name of diffusers' module.
        """
        for stack in self.stacks:
            if (found := _in_block(module, stack.ours)) is not None:
                block, inner = found
                for name in self._back[stack.theirs].get(inner, ()):
                    yield f"{stack.theirs}.{block}.{name}"
                return
        yield from self._back[""].get(module, ())
        back = {ours: theirs for theirs, ours in self.words.items()}
        changed = ".".join(back.get(part, part) for part in module.split("."))
        if changed != module:
            yield changed

    def joined(self, module: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield (a name, the modules of diffusers) of the layers whose first part is this module of diffusers.

        Args:
            module: The name of diffusers' module.
        """
        for stack in self.stacks:
            if (found := _in_block(module, stack.ours)) is not None:
                block, inner = found
                for theirs, parts in stack.joined.items():
                    if parts[0] == inner:
                        whole = tuple(f"{stack.ours}.{block}.{part}" for part in parts)
                        yield from ((f"{stack.theirs}.{block}.{name}", whole) for name in self._spelled(theirs))

    def _spelled(self, theirs: str) -> tuple[str, ...]:
        """Return the authors' name of a module, and how other tools spell it."""
        return (theirs, *(other for other, known in self.spellings.items() if known == theirs))

    @cached_property
    def _back(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Names of diffusers -> those of others, per stack; ``""`` is outside of blocks."""
        tables = {"": self.modules, **{stack.theirs: stack.modules for stack in self.stacks}}
        return {key: {ours: self._spelled(theirs) for theirs, ours in table.items()} for key, table in tables.items()}


def _in_block(module: str, stack: str) -> tuple[str, str] | None:
    """Return (the number of the block, the rest of the name) of a module of this stack, or None for another module."""
    number, dot, inner = module.removeprefix(f"{stack}.").partition(".")
    return (number, inner) if module.startswith(f"{stack}.") and dot and number.isdecimal() else None
