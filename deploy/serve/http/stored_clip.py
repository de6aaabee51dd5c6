"""The answer with a clip that is in no file of this machine: whole, or one range of its bytes, a few megabytes at a time."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dvdquant.deploy.serve.store.files import ClipFiles

__all__ = ["stored_clip"]

_BLOCK = 4 << 20  # bytes that are held for a client at a time
_RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})", re.ASCII)


def stored_clip(request: Request, files: ClipFiles, video: str, size: int) -> Response:
    """Return the answer.

    Args:
        request: The request; of its ranges one is served, and of several none, so that the whole clip is sent.
        files: The place of the clip.
        video: The id.
        size: The bytes of the clip.
    """
    headers = {"accept-ranges": "bytes", "content-disposition": f'inline; filename="{video}.mp4"'}
    status, begin, end = 200, 0, size
    found = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if found is not None and (found[1] or found[2]):
        begin, end = _bounds(found[1], found[2], size)
        if not begin < end:
            return Response(status_code=416, headers={**headers, "content-range": f"bytes */{size}"})
        status = 206
        headers["content-range"] = f"bytes {begin}-{end - 1}/{size}"
    headers["content-length"] = str(end - begin)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type="video/mp4")
    return StreamingResponse(_blocks(files, video, begin, end), status, headers, "video/mp4")


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    """Return the first byte of a range, and the one after its last."""
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


async def _blocks(files: ClipFiles, video: str, begin: int, end: int) -> AsyncIterator[bytes]:
    while begin < end:
        block = await files.read(video, begin, min(end, begin + _BLOCK))
        if not block:
            raise OSError(f"the clip {video} ends too early")  # the client sees a connection that breaks
        begin += len(block)
        yield block
