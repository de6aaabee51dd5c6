"""``dvdq``: every command of dvdquant as a subcommand."""

from __future__ import annotations

import difflib
from importlib import import_module

import click
import click.shell_completion

from dvdquant import __version__
from dvdquant.cli.commands import COMMANDS
from dvdquant.cli.shared.common import ExamplesCommand

__all__ = ["main"]

EXAMPLES = """
# a trained toy model: export it, look at it, draw with it
dvdq export examples/tiny-wan -o out/tiny-wan --recipe w4a4
dvdq inspect out/tiny-wan --check
dvdq run out/tiny-wan --prompt "ring red right large black" -o clip.mp4
"""


class _Commands(ExamplesCommand, click.Group):
    """The commands of the table, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table, which is that of a user's way."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of a name; None where there is none."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = import_module(entry.module).main
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command as click does; the error of an unknown one has the near names."""
        name = args[0].removeprefix("dvdq-")
        if not args[0].startswith("-") and name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=2) or list(COMMANDS)
            ctx.fail(
                f"there is no command {args[0]!r:.80}\n  available: {', '.join(COMMANDS)}\n  fix: try {' or '.join(near)}"
            )
        return super().resolve_command(ctx, [name, *args[1:]] if name in COMMANDS else args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table, without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl([(entry.name, entry.purpose) for entry in COMMANDS.values()])
        scripts = [f"dvdq-{entry.name}" for entry in COMMANDS.values() if entry.script]
        with formatter.section("The same under names of their own"):
            formatter.write(f"{'':>{formatter.current_indent}}{', '.join(scripts)}\n")

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[click.shell_completion.CompletionItem]:
        """Complete names from the table alone: a shell does not wait for imports."""
        names = [entry for entry in COMMANDS.values() if entry.name.startswith(incomplete)]
        found = [click.shell_completion.CompletionItem(entry.name, help=entry.purpose) for entry in names]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(cls=_Commands, examples=EXAMPLES, invoke_without_command=True)
@click.version_option(__version__, prog_name="dvdq")
@click.pass_context
def main(ctx: click.Context, /) -> None:
    """Turn video diffusion transformers into 4-bit weights, ONNX graphs and TensorRT engines, and run them."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


if __name__ == "__main__":
    main()
