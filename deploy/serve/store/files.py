"""The files of a server, in its data folder or in an object store: clips, and the pictures of requests.

All are named by ids that the server made.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from dvdquant.deploy.serve.jobs import VIDEO_ID
from dvdquant.deploy.serve.request.pictures import PICTURES
from dvdquant.system.whole_file import sweep_unfinished, write_whole

__all__ = ["ClipFiles", "FilesAwayError", "FolderFiles", "check_id", "check_picture"]


class FilesAwayError(OSError):
    """The place of the files does not answer, or refuses. Its text holds no key."""


class ClipFiles(ABC):
    """The place for clips and pictures. A file is there whole or not at all; the job in the store says whether it counts.

    Attributes:
        exclusive: True if nobody else keeps files in the place, so that one that no job knows may be deleted.
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
        """Return the file of this machine that holds the clip, or None if there is none.

        Args:
            video: The id of the job, ``video_…``.
        """
        del video
        return None

    def link(self, video: str) -> str | None:
        """Return an address where clients may fetch the clip for a while, or None if they cannot.

        Args:
            video: The id of the job, ``video_…``.
        """
        del video
        return None

    @abstractmethod
    async def size(self, video: str) -> int | None:
        """Return the bytes of a clip, or None if there is none.

        Args:
            video: The id of the job, ``video_…``.
        """

    @abstractmethod
    async def read(self, video: str, begin: int, end: int) -> bytes:
        """Return the bytes of a clip from ``begin`` until before ``end``.

        Args:
            video: The id of the job, ``video_…``.
            begin: The first byte.
            end: The byte behind the last one.

        Raises:
            OSError: The clip is gone.
        """

    @abstractmethod
    def write_picture(self, video: str, name: str, png: bytes) -> None:
        """Keep a picture of a request, whole or not at all.

        Args:
            video: The id of the job.
            name: ``input_reference`` or ``last_reference``.
            png: The file.
        """

    @abstractmethod
    def picture(self, video: str, name: str) -> bytes | None:
        """Return a picture of a request, or None if there is none.

        Args:
            video: The id of the job, ``video_…``.
            name: ``input_reference`` or ``last_reference``.
        """

    @abstractmethod
    def delete(self, video: str) -> None:
        """Delete a clip and its pictures; nothing happens if there are none.

        Args:
            video: The id of the job, ``video_…``.
        """

    @abstractmethod
    def delete_clip(self, video: str) -> None:
        """Delete a clip; its job is still there, and so are its pictures.

        Args:
            video: The id of the job, ``video_…``.
        """

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Yield the ids that have a clip or a picture."""

    @abstractmethod
    def sweep(self) -> None:
        """Delete what writers that were killed have left."""


class FolderFiles(ClipFiles):
    """Clips in a folder, in up to 256 folders below it; pictures likewise in the folder ``pictures`` beside it.

    Args:
        root: The folder; it is made when it is needed.
    """

    exclusive = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pictures = root.parent / "pictures"

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

    def write_picture(self, video: str, name: str, png: bytes) -> None:
        """See :class:`ClipFiles`."""
        path = self._picture(video, name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, png)

    def picture(self, video: str, name: str) -> bytes | None:
        """See :class:`ClipFiles`."""
        with contextlib.suppress(FileNotFoundError):
            return self._picture(video, name).read_bytes()
        return None

    def delete(self, video: str) -> None:
        """See :class:`ClipFiles`."""
        for path in (self._place(video), *(self._picture(video, name) for name in PICTURES)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def delete_clip(self, video: str) -> None:
        """See :class:`ClipFiles`."""
        with contextlib.suppress(FileNotFoundError):
            self._place(video).unlink()

    def ids(self) -> Iterator[str]:
        """See :class:`ClipFiles`."""
        found = {path.stem for path in self.root.glob("??/video_*.mp4")}
        found |= {path.name.partition(".")[0] for path in self.pictures.glob("??/video_*.png")}
        yield from sorted(name for name in found if VIDEO_ID.fullmatch(name))

    def sweep(self) -> None:
        """See :class:`ClipFiles`."""
        for root in (self.root, self.pictures):
            for folder in root.glob("??"):
                sweep_unfinished(folder)

    def _picture(self, video: str, name: str) -> Path:
        place = self._place(video)
        return self.pictures / place.parent.name / f"{place.stem}.{check_picture(name)}.png"

    def _place(self, video: str) -> Path:
        return self.root / check_id(video)[6:8] / f"{video}.mp4"


def check_id(video: str) -> str:
    """Return an id of a video. Ids come from the store, never from a request; this holds even if somebody forgets it.

    Args:
        video: The id.

    Raises:
        ValueError: It has not the form of one.
    """
    if not VIDEO_ID.fullmatch(video):
        raise ValueError(f"{video!r:.60} is no id of a video")
    return video


def check_picture(name: str) -> str:
    """Return the name of a picture.

    Args:
        name: The name.

    Raises:
        ValueError: No picture of a request has it.
    """
    if name not in PICTURES:
        raise ValueError(f"{name!r:.60} is no picture of a request")
    return name
