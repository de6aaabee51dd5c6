"""The files and the closing words of ``dvdq-run``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdquant.cli.clips.run_text import compare_text, summary_text
from dvdquant.cli.shared.common import echo
from dvdquant.errors import OutputError

if TYPE_CHECKING:
    from dvdquant.cli.clips.run_options import RunOptions
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.generation.request import GenerateResult
    from dvdquant.deploy.generation.video import Row
    from dvdquant.system.progress import Progress

__all__ = ["Writer", "numbered_path"]


def numbered_path(path: Path, index: int, count: int) -> Path:
    """Return ``clip.mp4``, or of several ``clip-1.mp4``, ``clip-2.mp4``.

    Args:
        path: The path of a single clip.
        index: The number of the clip, from 0.
        count: How many clips there are.
    """
    return path if count == 1 else path.with_name(f"{path.stem}-{index + 1:0{len(str(count))}d}{path.suffix}")


@dataclass
class Writer:
    """Writes each clip as soon as it is there; strip and trace of all of them at the end.

    Args:
        settings: The options of the command.
        count: How many prompts there are.
        rows: The rows of the strip so far.
        clips: The clips so far, as the trace has them.
        written: What was written so far: its kind and its path.
    """

    settings: RunOptions
    count: int
    rows: list[Row] = field(default_factory=list)
    clips: list[dict[str, Any]] = field(default_factory=list)
    written: list[tuple[str, Path]] = field(default_factory=list)

    @classmethod
    def open(cls, settings: RunOptions, count: int) -> Writer:
        """Check every path before anything is generated.

        Args:
            settings: The options of the command.
            count: How many prompts there are.

        Raises:
            OutputError: A suffix is unknown, a folder cannot be written, or one path is given for two files.
        """
        from dvdquant.deploy.generation.video import check_target

        wanted = (
            ("--output", settings.output, (".mp4", ".gif"), True),
            ("--gif", settings.gif, (".gif",), True),
            ("--strip", settings.strip, (".png",), False),
            ("--trace", settings.trace, (".json",), False),
        )
        seen: dict[Path, str] = {}
        for option, path, suffixes, many in wanted:
            if path is None:
                continue
            for index in range(count if many else 1):
                target = check_target(numbered_path(path, index, count) if many else path, suffixes).absolute()
                if target in seen:
                    raise OutputError(f"{option} and {seen[target]} are both {path}", fix="give each its own name")
                seen[target] = option
        if settings.fps is not None and not 0.1 <= settings.fps <= 240:
            raise OutputError(f"--fps is {settings.fps}", available="0.1 to 240", fix="give --fps 16, or leave it out")
        return cls(settings, count)

    def clip(self, results: list[GenerateResult], fps: int, progress: Progress) -> None:
        """Write the clip of one prompt (several results: side by side), and say how it was made.

        Args:
            results: The results of the prompt, one a mode.
            fps: Frames a second.
            progress: Where the files are named.
        """
        from dvdquant.deploy.generation.psnr import psnr
        from dvdquant.deploy.generation.run_report import clip_json
        from dvdquant.deploy.generation.video import enlarge, side_by_side

        compare = len(results) > 1
        values = [psnr(r.frames, results[0].frames) if compare and i else None for i, r in enumerate(results)]
        rows = [_row(result, value) for result, value in zip(results, values)]
        picture = side_by_side(rows) if compare else enlarge(results[0].frames)
        outputs = self._write(picture, self.settings.fps or fps)
        prompt = results[0].request.prompt
        self.rows += [_strip_row(row, prompt, i if compare else None) for i, row in enumerate(rows)]
        self.clips += [clip_json(result, outputs, value) for result, value in zip(results, values)]
        if progress.log_format == "json":
            for result, value in zip(results, values):
                fields = {"prompt": prompt, "mode": result.request.mode, "psnr_to_16_bit": value}
                progress.event("clip", **fields, seconds=result.seconds, summary=result.summary)
            return
        echo(f'\n"{prompt}", seed {results[0].request.seed}')
        echo(compare_text(results, values) if compare else summary_text(results[0]))

    def _write(self, picture: Any, fps: float) -> dict[str, str]:
        """Write the clip's own files; their paths by kind."""
        from dvdquant.deploy.generation.video import write_gif, write_mp4

        index = len({clip["outputs"]["clip"] for clip in self.clips})
        outputs: dict[str, str] = {}
        for kind, base in (("clip", self.settings.output), ("gif", self.settings.gif)):
            if base is not None:
                path = numbered_path(base, index, self.count)
                (write_gif if path.suffix.lower() == ".gif" else write_mp4)(path, picture, fps)
                outputs[kind] = str(path)
                self.written.append((kind, path))
        return outputs

    def finish(self, artifact: Artifact, progress: Progress) -> None:
        """Write strip and trace, and list every file.

        Args:
            artifact: The export, which the trace names.
            progress: Where the files are listed.
        """
        from dvdquant.deploy.generation.run_report import write_trace
        from dvdquant.deploy.generation.video import write_strip

        if self.settings.strip is not None:
            write_strip(self.settings.strip, self.rows)
            self.written.append(("strip", self.settings.strip))
            for clip in self.clips:
                clip["outputs"]["strip"] = str(self.settings.strip)  # one picture of all of them
        if self.settings.trace is not None:
            write_trace(self.settings.trace, artifact, self.clips)
            self.written.append(("trace", self.settings.trace))
        if progress.log_format == "json":
            progress.event("done", files=[str(path) for _, path in self.written])
            return
        echo("")
        for kind, path in self.written:
            echo(f"{kind:<6} {path}")


def _row(result: GenerateResult, psnr: float | None) -> Row:
    """Return the clip under the name of its mode."""
    from dvdquant.deploy.generation.run_report import average_bits_text, steps_of
    from dvdquant.deploy.generation.video import Row

    request = result.request
    if request.mode == "16":
        return Row(result.frames, "16 bit", f"original, {result.executed['dtype']}")
    notes = []
    if request.mode in ("switch", "planned"):
        notes.append(f"{average_bits_text(steps_of(result.trace))} bits on average")
    if psnr is not None:
        notes.append("equal to 16 bit" if psnr == float("inf") else f"{psnr:.1f} dB to 16 bit")
    return Row(result.frames, "schedule" if request.mode == "planned" else request.mode, "\n".join(notes))


def _strip_row(row: Row, prompt: str, place: int | None) -> Row:
    """Return the row of a strip. ``place`` in a comparison: its first row also says the prompt; else the prompt is the title."""
    from dvdquant.deploy.generation.video import Row

    if place is None:
        return Row(row.frames, prompt, f"{row.title}\n{row.note}")
    return Row(row.frames, row.title, f"{row.note}\n{prompt}") if place == 0 else row
