"""The clips of a server in an object store that speaks S3, for servers on several machines.

An object is visible when it is whole: a small clip goes up in one request, a larger one in parts that the last request joins.
Keys come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``), or from
the machine's role; they are in no setting, no message between processes and no log.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from dvdquant.deploy.serve.jobs import VIDEO_ID
from dvdquant.deploy.serve.request.pictures import PICTURES
from dvdquant.deploy.serve.store.files import ClipFiles, FilesAwayError, check_id, check_picture
from dvdquant.errors import OutputError, UnsupportedError
from dvdquant.text import shown

__all__ = ["S3Files", "check_address"]

_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_TOKEN")
_PART = 8 << 20  # bytes; S3 wants at least 5 MiB
_TYPE = {"Content-Type": "video/mp4"}


class S3Files(ClipFiles):
    """See :class:`.files.ClipFiles`.

    Args:
        address: ``s3://bucket/prefix``.
        scratch: A folder of this machine, where a clip is encoded before it is uploaded.
        endpoint: The address of a server other than Amazon's, such as ``http://minio:9000``, or None.
        link_seconds: Seconds for which clients may fetch a clip from the object store by themselves; 0 sends it through the
            server.

    Attributes:
        store: The client of the bucket, an ``obstore.store.S3Store``.

    Raises:
        UnsupportedError: An address is out of form, or holds a password.
        OutputError: The bucket does not answer, or refuses.
    """

    def __init__(self, address: str, scratch: Path, endpoint: str | None = None, link_seconds: float = 0.0) -> None:
        bucket, prefix = check_address(address, endpoint)
        self.scratch = scratch
        self.link_seconds = link_seconds
        self.prefix = f"{prefix}/" if prefix else ""
        plain = endpoint is not None and endpoint.startswith("http:")
        options = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(seconds=120)}
        more = {} if endpoint is None else {"endpoint": endpoint}
        try:
            self.store = S3Store(
                bucket,
                client_options={"allow_http": plain, **options},
                retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=60)},
                **more,
            )
            for _ in obstore.list(self.store, self.prefix or None, chunk_size=1):
                break
        except (BaseError, ValueError) as error:
            raise OutputError(
                f"the bucket {shown(bucket, 80)} cannot be used for clips: {_text(error)}",
                fix="check --files, --s3-endpoint, AWS_REGION and the keys, which must be allowed to list, get, put and delete",
            ) from None

    def write(self, video: str, make: Callable[[Path], None]) -> int:
        """See :class:`.files.ClipFiles`."""
        local = self.scratch / f"{check_id(video)}.mp4"
        make(local)
        with local.open("rb") as file:
            local.unlink()  # nothing of it stays, whatever happens to this process
            size = os.fstat(file.fileno()).st_size
            with _telling("the clip cannot be uploaded"):
                obstore.put(self.store, self._key(video), file, attributes=_TYPE, chunk_size=_PART, max_concurrency=4)
        return size

    def link(self, video: str) -> str | None:
        """See :class:`.files.ClipFiles`."""
        if not self.link_seconds:
            return None
        return str(obstore.sign(self.store, "GET", self._key(video), timedelta(seconds=self.link_seconds)))

    async def size(self, video: str) -> int | None:
        """See :class:`.files.ClipFiles`."""
        with _telling("the clip cannot be found"), contextlib.suppress(FileNotFoundError):
            return int((await obstore.head_async(self.store, self._key(video)))["size"])
        return None

    async def read(self, video: str, begin: int, end: int) -> bytes:
        """See :class:`.files.ClipFiles`."""
        with _telling("the clip cannot be read"):
            return bytes(await obstore.get_range_async(self.store, self._key(video), start=begin, end=end))

    def write_picture(self, video: str, name: str, png: bytes) -> None:
        """See :class:`.files.ClipFiles`."""
        with _telling("the picture cannot be uploaded"):
            obstore.put(self.store, self._picture(video, name), png, attributes={"Content-Type": "image/png"})

    def picture(self, video: str, name: str) -> bytes | None:
        """See :class:`.files.ClipFiles`."""
        with _telling("the picture cannot be read"), contextlib.suppress(FileNotFoundError):
            return bytes(obstore.get(self.store, self._picture(video, name)).bytes())
        return None

    def delete(self, video: str) -> None:
        """See :class:`.files.ClipFiles`."""
        self._delete([self._key(video), *(self._picture(video, name) for name in PICTURES)])

    def delete_clip(self, video: str) -> None:
        """See :class:`.files.ClipFiles`."""
        self._delete([self._key(video)])

    def _delete(self, keys: list[str]) -> None:
        with _telling("the clip cannot be deleted"):
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self.store, key)

    def ids(self) -> Iterator[str]:
        """See :class:`.files.ClipFiles`."""
        seen: set[str] = set()
        with _telling("the clips cannot be listed"):
            for batch in obstore.list(self.store, self.prefix or None, chunk_size=1000):
                for entry in batch:
                    name = entry["path"].rpartition("/")[2].partition(".")[0]
                    if VIDEO_ID.fullmatch(name) and name not in seen:
                        seen.add(name)
                        yield name

    def sweep(self) -> None:
        """Do nothing: of uploads that were broken off, other servers may have some; a rule of the bucket ends them."""

    def _key(self, video: str) -> str:
        return f"{self.prefix}{check_id(video)}.mp4"

    def _picture(self, video: str, name: str) -> str:
        return f"{self.prefix}pictures/{check_id(video)}.{check_picture(name)}.png"


def check_address(address: str, endpoint: str | None) -> tuple[str, str]:
    """Return bucket and prefix of ``s3://bucket/prefix``.

    Args:
        address: The address of the place.
        endpoint: The address of the server, or None.

    Raises:
        UnsupportedError: One is out of form, or holds a key, which everybody could read in the list of processes.
    """
    parts = urlsplit(address)
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
        raise UnsupportedError("--files is no place for clips", available="s3://bucket/prefix", fix="name one")
    server = urlsplit(endpoint or "https://x")
    if "@" in parts.netloc or "@" in server.netloc:
        raise UnsupportedError(
            "--files or --s3-endpoint holds a key", fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        )
    if server.scheme not in ("http", "https") or not server.netloc or server.query or server.fragment:
        raise UnsupportedError("--s3-endpoint is no address of a server", available="http://host:port, https://host")
    prefix = parts.path.strip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
        raise UnsupportedError(f"{shown(prefix, 80)!r} is no prefix of objects", available="words with / between them")
    return parts.netloc, prefix


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    """Give an error of the object store in the block the words of a server; a FileNotFoundError is none of them."""
    try:
        yield
    except BaseError as error:
        raise FilesAwayError(f"{what}: {_text(error)}") from None


def _text(error: BaseException) -> str:
    """Return the first line of an error without any key: what a server answers may quote one."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, f"<{name}>")
    return shown(text.partition("<?xml")[0].partition("Debug source")[0], 300)
