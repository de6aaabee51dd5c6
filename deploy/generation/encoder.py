"""The encoder of clips: ffmpeg as a process of its own that may be missing, wrong, slow or killed."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dvdquant.errors import OutputError
from dvdquant.text import shown

__all__ = ["count_frames", "encode_mp4", "find_encoder", "mp4_frames"]

Clip = np.ndarray[Any, np.dtype[np.uint8]]

VARIABLE = "IMAGEIO_FFMPEG_EXE"
PATIENCE = 120.0  # seconds without a byte taken, written or said
_CODECS = ("libx264", "h264_nvenc", "h264_vaapi", "libopenh264", "libx264rgb")
_CHUNK = 1 << 20
_TAIL = 2000  # bytes of what ffmpeg said that an error shows
_BOX = re.compile(rb"[ -~]{4}")


class EncoderError(OutputError):
    """ffmpeg cannot be run, or what it made is no clip."""


def find_encoder() -> tuple[str, str]:
    """Return (the ffmpeg to run, its H.264 codec), known before hours of work.

    Raises:
        OutputError: There is none, or what ``IMAGEIO_FFMPEG_EXE`` names is no ffmpeg. The error names it.
    """
    import imageio_ffmpeg  # type: ignore[import-untyped]

    try:
        exe = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise EncoderError("no ffmpeg was found", fix=f"install ffmpeg, or set {VARIABLE} to its path") from error
    return exe, _codec(exe, PATIENCE)


def encode_mp4(path: Path, clip: Clip, fps: float) -> None:
    """Encode ``clip`` [F, H, W, 3] uint8, height and width even, as H.264 in yuv420p into the file ``path``.

    Args:
        path: The path of the file.
        clip: The frames, uint8 [F, H, W, 3].
        fps: Frames per second.

    Raises:
        OutputError: There is no ffmpeg (see :func:`find_encoder`), or it fails, stops answering, or makes something else than
            these frames.
    """
    from fractions import Fraction

    exe, codec = find_encoder()
    frames, height, width = clip.shape[:3]
    rate = str(Fraction(fps).limit_denominator())
    quality = ["-crf", "5"] if codec == "libx264" else ["-qscale:v", "3"]
    command = [
        *(
            exe,
            "-y",
            "-f",
            "rawvideo",
            "-vcodec",
            "rawvideo",
            "-s",
            f"{width}x{height}",
            "-pix_fmt",
            "rgb24",
            "-r",
            rate,
        ),
        *("-i", "-", "-an", "-vcodec", codec, "-pix_fmt", "yuv420p", *quality, "-v", "warning", _operand(path)),
    ]
    _run(command, memoryview(clip.tobytes()), path)
    written = mp4_frames(path)
    if written is None:
        raise EncoderError(f"{_named(exe)} ended well, but what it wrote is no mp4", fix=_fix())
    if written == frames:
        written = count_frames(path)  # decoded: the frames are there, and not only their table
    if written != frames:
        raise EncoderError(f"{_named(exe)} wrote {written} of {frames} frames", fix="free disk space, then retry")


def count_frames(path: Path) -> int:
    """Return how many frames of the video ``path`` ffmpeg can decode.

    Args:
        path: The path of the file.

    Raises:
        EncoderError: There is no ffmpeg, or it cannot decode the file.
    """
    exe, _ = find_encoder()
    said = _run([exe, "-i", _operand(path), "-map", "0:v:0", "-vf", "null", "-f", "null", "-"], None, None)
    counts = re.findall(rb"frame=\s*(\d+)", said)
    if not counts:
        raise EncoderError(f"{_named(exe)} does not say how many frames it decoded", fix=_fix())
    return int(counts[-1])


def mp4_frames(path: Path) -> int | None:
    """Return the number of frames that the sample table of an mp4 lists; None for a file that is no whole mp4.

    Args:
        path: The path of the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start, end, first = 0, size, True
        wanted = ["moov", "trak", "mdia", "minf", "stbl", "stsz"]
        while start + 8 <= end:
            file.seek(start)
            head = file.read(16)
            length, kind, header = int.from_bytes(head[:4], "big"), head[4:8], 8
            if length == 1:
                length, header = int.from_bytes(head[8:16], "big"), 16
            elif length == 0:
                length = end - start
            if length < header or start + length > end or not _BOX.fullmatch(kind) or (first and kind != b"ftyp"):
                return None
            first = False
            if kind.decode("ascii") != wanted[0]:
                start += length
            elif len(wanted) == 1:
                file.seek(start + header + 8)  # version and flags, then one size for all samples, then their number
                return int.from_bytes(file.read(4), "big")
            else:
                wanted.pop(0)
                start, end = start + header, start + length
    return None


# ---------------------------------------------------------------------------------------------------------- the process


@lru_cache
def _codec(exe: str, patience: float) -> str:
    """Return the first H.264 codec of ``exe`` that works; hardware ones are tried, for ffmpeg lists them without the hardware."""
    listed = _run([exe, "-hide_banner", "-encoders"], None, None, patience)
    names = set(re.findall(r"^\s*V\S+\s+(\S+)", listed.decode("utf-8", "replace"), re.MULTILINE))
    trial = ["-hide_banner", "-f", "lavfi", "-i", "nullsrc=s=256x256:d=1", "-vcodec"]
    for codec in _CODECS:
        if codec in names:
            if codec == "libx264":
                return codec
            with contextlib.suppress(EncoderError):
                _run([exe, *trial, codec, "-f", "null", "-"], None, None, patience)
                return codec
    what = "lists no H.264 encoder" if names else "does not answer like ffmpeg"
    raise EncoderError(f"{_named(exe)} {what}", available=sorted(names)[:8] or None, fix=_fix())


def _run(command: list[str], data: memoryview | None, output: Path | None, patience: float | None = None) -> bytes:
    """Feed ``data`` to ``command`` and return what it says on stdout and stderr, the last megabyte of it.

    It has ``patience`` seconds for every sign of life: bytes taken or said, or ``output`` grown.
    OutputError if it cannot be started, gives none, or fails.
    """
    exe = command[0]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if data is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C is for us; we end it
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EncoderError(f"{_named(exe)} cannot be started: {reason}", fix=_fix()) from error
    try:
        said = _attend(process, data, output, PATIENCE if patience is None else patience)
        code = process.wait()
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
    if code:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
        tail = shown(said[-_TAIL:].decode("utf-8", "replace").strip(), 0, keep="\n")
        full = "No space left" in tail or "File too large" in tail or code == -signal.SIGXFSZ
        raise EncoderError(
            f"{_named(exe)} {how}" + (f":\n{tail}" if tail else ""),
            fix="free disk space, then retry" if full else _fix(),
        )
    return said


def _attend(process: subprocess.Popen[bytes], data: memoryview | None, output: Path | None, patience: float) -> bytes:
    """Write and read until the process closes its output and ends. OutputError when it gives no sign of life."""
    said, sent, idle, grown = bytearray(), 0, 0.0, -1
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
        before = time.monotonic()
        while selector.get_map() or process.poll() is None:
            alive = False
            for key, _ in selector.select(0.1):
                alive = True
                if key.fileobj is process.stdout:
                    part = os.read(process.stdout.fileno(), 1 << 16)
                    said += part
                    del said[: -(1 << 20)]
                    if not part:
                        selector.unregister(process.stdout)
                elif process.stdin is not None and data is not None:
                    try:
                        sent += os.write(process.stdin.fileno(), data[sent : sent + _CHUNK])
                    except BlockingIOError:
                        alive = False
                    except BrokenPipeError:  # it ended early: its exit code tells why
                        sent = len(data)
                    if sent == len(data):
                        selector.unregister(process.stdin)
                        process.stdin.close()
            if process.poll() is not None and not alive:
                break  # a child of its own may hold the pipe open
            if not selector.get_map():
                time.sleep(0.01)
            if output is not None:
                size = output.stat().st_size if output.exists() else -1
                alive, grown = alive or size != grown, size
            now = time.monotonic()
            # At most a second at a time: while this process was stopped, the other may have been as well.
            idle = 0.0 if alive else idle + min(now - before, 1.0)
            before = now
            if idle > patience:
                raise EncoderError(
                    f"{_named(process.args[0])} has not answered for {patience:.0f} s and was stopped",  # type: ignore[index]
                    fix=_fix(),
                )
    return bytes(said)


def _operand(path: Path) -> str:
    """Return the path as ffmpeg takes it for a file: not for an option or a protocol, whatever its name."""
    return str(path.absolute())


def _named(exe: Any) -> str:
    given = os.environ.get(VARIABLE)
    return f"ffmpeg ({VARIABLE}={exe})" if given and given == exe else f"ffmpeg ({exe})"


def _fix() -> str:
    if os.environ.get(VARIABLE):
        return f"unset {VARIABLE}, or set it to an ffmpeg that runs; .gif needs none"
    return f"set {VARIABLE} to an ffmpeg that runs; .gif needs none"
