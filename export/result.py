"""The result of an export, and what it needs of those who know more: a writer of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dvdquant.artifact.manifest import Manifest
from dvdquant.export.verify.graph import GraphCheck
from dvdquant.export.verify.stored import StoredCheck
from dvdquant.system.files import FileEntry
from dvdquant.system.progress import Progress

__all__ = ["ExportResult", "WriteReport"]


@dataclass
class ExportResult:
    """The result of an export.

    Args:
        out: The folder of the export.
        manifest: Its manifest.
        checks: The checks of its graphs by ``--verify``.
        stored: The comparisons of what is stored with the checkpoints by ``--verify``, one per transformer.
        seconds: The time of each stage in seconds, by its name.
        builds: A report for every engine that was built: its path and ``BuildReport.to_json()``.
        up_to_date: True if the export was there already and nothing was done.
    """

    out: Path
    manifest: Manifest
    checks: list[GraphCheck] = field(default_factory=list)
    stored: list[StoredCheck] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    builds: list[dict[str, Any]] = field(default_factory=list)
    up_to_date: bool = False


class WriteReport(Protocol):
    """A writer of ``report.html`` in the tree of an unfinished export.

    :func:`dvdquant.deploy.report.page.add_report` is one. The report draws clips, which needs the runtime. So the
    writer is given to the exporter, which does not know the runtime.
    """

    def __call__(
        self,
        tree: Path,
        manifest: Manifest,
        known: dict[str, FileEntry],
        *,
        checks: Sequence[Mapping[str, Any]],
        out: Path,
        samples: int | None,
        checkpoint_bytes: int,
        progress: Progress,
    ) -> None:
        """Write ``report.html``.

        Args:
            tree: The folder of the unfinished export.
            manifest: Its manifest, without the files.
            known: Hashes that are already known, by relative path.
            checks: The checks of the graphs, ``GraphCheck.to_json()`` of each.
            out: The folder that the export will be in.
            samples: The number of prompts to show clips of; None means the writer's default.
            checkpoint_bytes: The size of the checkpoints in bytes.
            progress: The place that stages report to.
        """
