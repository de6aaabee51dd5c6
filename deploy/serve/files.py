"""The clips of a server: one file each in a data folder, named by an id that the server made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from dvdquant.deploy.serve.jobs import VIDEO_ID
from dvdquant.system.whole_file import sweep_unfinished

__all__ = ["FolderFiles"]


class FolderFiles:
    """Clips in a folder, in up to 256 folders below it.

    Args:
        root: The folder; it is made when it is needed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, video: str, make: Callable[[Path], None]) -> int:
        """Keep the clip that ``make`` writes to the path it gets, whole or not at all. Return its size in bytes.

        Args:
            video: The id of the job.
            make: An atomic writer of an mp4, such as :func:`.video.write_mp4`.
        """
        path = self._place(video)
        make(path)
        return path.stat().st_size

    def path(self, video: str) -> Path | None:
        """Return the file that holds the clip, or None if there is none."""
        path = self._place(video)
        return path if path.is_file() else None

    def delete(self, video: str) -> None:
        """Delete a clip; nothing happens if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._place(video).unlink()

    def ids(self) -> Iterator[str]:
        """Yield the ids of all clips."""
        for path in sorted(self.root.glob("??/video_*.mp4")):
            if VIDEO_ID.fullmatch(path.stem):
                yield path.stem

    def sweep(self) -> None:
        """Delete what writers that were killed have left."""
        for folder in self.root.glob("??"):
            sweep_unfinished(folder)

    def _place(self, video: str) -> Path:
        # Ids come from the store, never from a request; this holds even if somebody forgets it.
        if not VIDEO_ID.fullmatch(video):
            raise ValueError(f"{video!r:.60} is no id of a video")
        return self.root / video[6:8] / f"{video}.mp4"
