"""The files of a server in its data folder: clips, and the pictures of requests, named by ids that the server made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from dvdquant.deploy.serve.jobs import VIDEO_ID
from dvdquant.deploy.serve.pictures import PICTURES
from dvdquant.system.whole_file import sweep_unfinished, write_whole

__all__ = ["FolderFiles"]


class FolderFiles:
    """Clips in a folder, in up to 256 folders below it; pictures likewise in the folder ``pictures`` beside it.

    Args:
        root: The folder; it is made when it is needed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pictures = root.parent / "pictures"

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

    def write_picture(self, video: str, name: str, png: bytes) -> None:
        """Keep a picture of a request, whole or not at all.

        Args:
            video: The id of the job.
            name: ``input_reference`` or ``last_reference``.
            png: The file.
        """
        path = self._picture(video, name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, png)

    def picture(self, video: str, name: str) -> bytes | None:
        """Return a picture of a request, or None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return self._picture(video, name).read_bytes()
        return None

    def delete(self, video: str) -> None:
        """Delete a clip and its pictures; nothing happens if there are none."""
        for path in (self._place(video), *(self._picture(video, name) for name in PICTURES)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def delete_clip(self, video: str) -> None:
        """Delete a clip; its job is still there, and so are its pictures."""
        with contextlib.suppress(FileNotFoundError):
            self._place(video).unlink()

    def ids(self) -> Iterator[str]:
        """Yield the ids that have a clip or a picture."""
        found = {path.stem for path in self.root.glob("??/video_*.mp4")}
        found |= {path.name.partition(".")[0] for path in self.pictures.glob("??/video_*.png")}
        yield from sorted(name for name in found if VIDEO_ID.fullmatch(name))

    def sweep(self) -> None:
        """Delete what writers that were killed have left."""
        for root in (self.root, self.pictures):
            for folder in root.glob("??"):
                sweep_unfinished(folder)

    def _picture(self, video: str, name: str) -> Path:
        if name not in PICTURES:
            raise ValueError(f"{name!r:.60} is no picture of a request")
        place = self._place(video)
        return self.pictures / place.parent.name / f"{place.stem}.{name}.png"

    def _place(self, video: str) -> Path:
        # Ids come from the store, never from a request; this holds even if somebody forgets it.
        if not VIDEO_ID.fullmatch(video):
            raise ValueError(f"{video!r:.60} is no id of a video")
        return self.root / video[6:8] / f"{video}.mp4"
