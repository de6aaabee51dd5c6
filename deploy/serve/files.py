"""The clips of a server: one file each, named by an id that the server made, in a folder or in an object store."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from dvdquant.deploy.serve.jobs import VIDEO_ID
from dvdquant.system.whole_file import sweep_unfinished

__all__ = ["ClipFiles", "FilesAwayError", "FolderFiles", "check_id"]


class FilesAwayError(OSError):
    """The place of the clips does not answer, or refuses. Its text holds no key."""


class ClipFiles(ABC):
    """The place for clips. A clip is there whole or not at all; the job in the store says whether it counts.

    Attributes:
        exclusive: True if nobody else keeps clips in the place, so that one that no job knows may be deleted.
    """

    exclusive = False

    @abstractmethod
    def write(self, video: str, make: Callable[[Path], None]) -> int:
        """Keep the clip that ``make`` writes to the path it gets, whole or not at all. Return its size in bytes.

        Args:
            video: The id of the job.
            make: An atomic writer of an mp4, such as :func:`.video.write_mp4`.
        """

    def path(self, video: str) -> Path | None:
        """Return the file of this machine that holds the clip, or None if there is none."""
        del video
        return None

    def link(self, video: str) -> str | None:
        """Return an address where clients may fetch the clip for a while, or None if they cannot."""
        del video
        return None

    @abstractmethod
    async def size(self, video: str) -> int | None:
        """Return the bytes of a clip, or None if there is none."""

    @abstractmethod
    async def read(self, video: str, begin: int, end: int) -> bytes:
        """Return the bytes of a clip from ``begin`` until before ``end``.

        Raises:
            OSError: The clip is gone.
        """

    @abstractmethod
    def delete(self, video: str) -> None:
        """Delete a clip; nothing happens if there is none."""

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Yield the ids of all clips."""

    def sweep(self) -> None:
        """Delete what writers that were killed have left."""


class FolderFiles(ClipFiles):
    """Clips in a folder, in up to 256 folders below it.

    Args:
        root: The folder; it is made when it is needed.
    """

    exclusive = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, video: str, make: Callable[[Path], None]) -> int:
        """See :class:`ClipFiles`."""
        path = self._place(video)
        make(path)
        return path.stat().st_size

    def path(self, video: str) -> Path | None:
        """See :class:`ClipFiles`."""
        path = self._place(video)
        return path if path.is_file() else None

    async def size(self, video: str) -> int | None:
        """See :class:`ClipFiles`."""
        path = self.path(video)
        return None if path is None else path.stat().st_size

    async def read(self, video: str, begin: int, end: int) -> bytes:
        """See :class:`ClipFiles`."""
        with self._place(video).open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def delete(self, video: str) -> None:
        """See :class:`ClipFiles`."""
        with contextlib.suppress(FileNotFoundError):
            self._place(video).unlink()

    def ids(self) -> Iterator[str]:
        """See :class:`ClipFiles`."""
        for path in sorted(self.root.glob("??/video_*.mp4")):
            if VIDEO_ID.fullmatch(path.stem):
                yield path.stem

    def sweep(self) -> None:
        """See :class:`ClipFiles`."""
        for folder in self.root.glob("??"):
            sweep_unfinished(folder)

    def _place(self, video: str) -> Path:
        return self.root / check_id(video)[6:8] / f"{video}.mp4"


def check_id(video: str) -> str:
    """Return an id of a video. Ids come from the store, never from a request; this holds even if somebody forgets it.

    Raises:
        ValueError: It has not the form of one.
    """
    if not VIDEO_ID.fullmatch(video):
        raise ValueError(f"{video!r:.60} is no id of a video")
    return video
