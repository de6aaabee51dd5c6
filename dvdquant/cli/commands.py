"""The table of all commands: ``dvdq NAME``, ``python -m dvdquant NAME`` and ``dvdq-NAME`` are the same.

A new command is a line here. Its module is imported when it is called, so that the others stay fast.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COMMANDS", "Entry"]


@dataclass(frozen=True)
class Entry:
    """A command.

    Args:
        name: The word after ``dvdq``.
        module: The module whose ``main`` is the command.
        purpose: What it is for, in a line.
        script: The command has a script ``dvdq-NAME`` of its own, too.
    """

    name: str
    module: str
    purpose: str
    script: bool = False


COMMANDS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("export", "dvdquant.cli.export", "quantize a model and write graphs and engines", script=True),
        Entry("run", "dvdquant.cli.run", "draw clips with an export, switching engines per step", script=True),
        Entry("serve", "dvdquant.cli.serve", "serve exports over HTTP, by OpenAI's video API", script=True),
        Entry("plan", "dvdquant.cli.plan", "find the delta of switching for an average of bits or time", script=True),
        Entry("build", "dvdquant.cli.build", "build an export's engines on the device they are for", script=True),
        Entry("bundle", "dvdquant.cli.bundle", "pack an export for a machine without internet", script=True),
        Entry("inspect", "dvdquant.cli.inspect", "show what an export holds, and check its files", script=True),
        Entry("bench", "dvdquant.cli.bench", "time a call of each engine or session on this machine"),
        Entry("doctor", "dvdquant.cli.doctor", "look at this machine: what it has, what is missing, what would run"),
        Entry("push", "dvdquant.cli.push", "put an export on the hub, where others read it by its name", script=True),
    )
}
