"""``dvdq-push``: put an export on the hub, where others read it by its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dvdquant import __version__
from dvdquant.cli.shared.common import ExamplesCommand, echo, setup_logging, table
from dvdquant.cli.shared.paths import EXPORT, WORD
from dvdquant.text import amount, json_text

if TYPE_CHECKING:
    from dvdquant.hub.push import PushPlan

EXAMPLES = """
# what would be sent: every file is hashed, nothing is sent, no token is needed
dvdq-push out/wan user/wan2.1-1.3b-w4a4 --dry-run

# into a private repository, which is made if it is not there
dvdq-push out/wan user/wan2.1-1.3b-w4a4 --private --license apache-2.0 --tag wan

# others (or you, elsewhere) read it by its name
dvdq-push out/wan user/wan2.1-1.3b-w4a4 --revision two-widths
"""


@click.command(cls=ExamplesCommand, examples=EXAMPLES)
@click.argument("out", type=EXPORT)
@click.argument("repo", type=WORD, metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository a private one.")
@click.option("--tag", "tags", type=WORD, multiple=True, metavar="TAG", help="One more tag for the card; repeat it.")
@click.option("--license", "license_name", type=WORD, metavar="NAME", help="License of the model, such as apache-2.0.")
@click.option(
    "--base-model", type=WORD, metavar="USER/NAME", help="Repository of the model.  [default: what was exported]"
)
@click.option("--revision", type=WORD, metavar="BRANCH", help="Push to this branch.  [default: the main one]")
@click.option("--message", type=WORD, metavar="TEXT", help="Message of the commit.")
@click.option("--force", is_flag=True, help="Replace another model's export, or add to files that are no export.")
@click.option("--dry-run", is_flag=True, help="Check every file and show what would be sent.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
@click.option("-v", "--verbose", count=True)
@click.version_option(__version__, prog_name="dvdq-push")
def main(
    out: Path,
    repo: str,
    private: bool,
    tags: tuple[str, ...],
    license_name: str | None,
    base_model: str | None,
    revision: str | None,
    message: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    verbose: int,
) -> None:
    """Put the export in folder OUT on the hub as USER/NAME: the files of its manifest, and a card."""
    setup_logging(verbose, "text")
    from dvdquant.artifact.manifest import load_manifest
    from dvdquant.hub.push import plan_push, push
    from dvdquant.system.progress import Progress

    total = sum(entry["bytes"] for entry in load_manifest(out).files.values())
    with Progress("text").stage("check", total, "B") as stage:
        card: Any = {"tags": tags, "license": license_name, "base_model": base_model}
        plan = plan_push(out, repo, private=private, progress=stage.update, **card)
    if dry_run:
        echo(json_text({"repo": repo, "files": plan.files, "card": plan.card}) if as_json else _summary(plan))
        return
    done = push(plan, revision=revision, message=message, force=force)
    if as_json:
        echo(json_text({"repo": repo, "url": done.url, "commit": done.commit, "removed": done.removed}))
        return
    echo(f"{len(plan.files)} files, {amount(sum(plan.files.values()))}, are {done.url}")
    if done.removed:
        echo(f"{len(done.removed)} files of the export that was there are removed")


def _summary(plan: PushPlan) -> str:
    rows = [(name, amount(size)) for name, size in sorted(plan.files.items())]
    kind = "private" if plan.private else "public"
    total = amount(sum(plan.files.values()))
    head = f"{len(rows)} files, {total}, match their manifest and would go to {plan.repo} ({kind} if it is new):"
    return "\n".join([head, "", table(("file", "size"), rows, right=(1,)), "", "card:", "", plan.card])


if __name__ == "__main__":
    main()
