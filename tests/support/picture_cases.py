"""Changed pictures, decoded with the limits of the product: ``python -m tests.support.picture_cases COUNT SEED``.

Each process of some hundred cases limits itself as the decoding of a request does, and decodes with the same function. So a
case costs no start of a process. The figures go to stdout, a line of JSON for each process.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import struct
import sys
import time
import zlib
from typing import IO

from tests.support.changed_bytes import NUMBERS, mutated
from tests.support.costs import peak

__all__ = ["changed_picture", "main", "pictures"]

PIXELS = 1_000_000
IN_A_PROCESS = 250
NAME = "input_reference"
_KINDS = (
    b"IHDR",
    b"PLTE",
    b"IDAT",
    b"IEND",
    b"tRNS",
    b"iCCP",
    b"zTXt",
    b"iTXt",
    b"tEXt",
    b"eXIf",
    b"acTL",
    b"fcTL",
    b"fdAT",
)
_PARTS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"EXIF", b"ICCP", b"XMP ")


def pictures() -> dict[str, list[bytes]]:
    """Whole files of each format, in several modes, with what cameras note."""
    from PIL import Image

    noise = Image.frombytes("RGB", (40, 24), random.Random(0).randbytes(40 * 24 * 3))
    exif = Image.Exif()
    exif[274] = 6
    saved: dict[str, list[bytes]] = {}
    for kind, mode, more in (
        ("PNG", "RGB", {"exif": exif}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("PNG", "RGBA", {}),
        ("JPEG", "RGB", {"exif": exif}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"exif": exif}),
    ):
        file = io.BytesIO()
        (noise.convert("L") if mode == "I;16" else noise).convert(mode).save(file, kind, **more)
        saved.setdefault(kind, []).append(file.getvalue())
    return saved


def changed_picture(whole: dict[str, list[bytes]], chance: random.Random) -> bytes:
    """A picture with changed bytes, changed parts (their lengths and checksums mostly right), or both."""
    kind = chance.choice(sorted(whole))
    raw = chance.choice(whole[kind])
    if chance.random() < 0.7:
        raw = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp}[kind](raw, chance)
    if chance.random() < 0.4:
        raw = mutated(raw, chance.choice((64, len(raw))), chance)
    return raw


def _shuffled(parts: list[tuple[bytes, bytes]], kinds: tuple[bytes, ...], chance: random.Random) -> None:
    """Change a part of (kind, content): its bytes, its kind, its place, or how often it is there."""
    for _ in range(chance.choice((1, 1, 2, 5))):
        at, way = chance.randrange(len(parts)), chance.randrange(6)
        kind, data = parts[at]
        if way == 0 and len(parts) > 1:
            del parts[at]
        elif way == 1:
            parts[at:at] = [parts[at]] * chance.choice((1, 2, 200))
        elif way == 2:
            parts[at] = (chance.choice(kinds), data)
        elif way == 3:
            parts.insert(chance.randrange(len(parts) + 1), (chance.choice(kinds), _content(chance)))
        elif way == 4 and data:
            place = chance.randrange(len(data))
            number = struct.pack(chance.choice("<>") + "I", chance.choice(NUMBERS) & 0xFFFFFFFF)
            parts[at] = (kind, data[:place] + number + data[place + 4 :])
        else:
            parts[at] = (kind, mutated(data or b"\0", 32, chance))


@functools.cache
def _bomb() -> bytes:
    """Four MiB of nothing, compressed."""
    return zlib.compress(bytes(1 << 22), 9)


def _content(chance: random.Random) -> bytes:
    """What a part may hold: nothing, noise, a bomb, or a head of EXIF."""
    bomb = _bomb()
    return chance.choice(
        (
            b"",
            chance.randbytes(chance.randrange(60)),
            b"x\0\0" + bomb,
            bomb,
            b"Exif\0\0II*\0\x08\0\0\0" + chance.randbytes(30),
        )
    )


def _png(raw: bytes, chance: random.Random) -> bytes:
    parts, at = [], 8
    while at + 12 <= len(raw):
        size = int.from_bytes(raw[at : at + 4], "big")
        parts.append((raw[at + 4 : at + 8], raw[at + 8 : at + 8 + size]))
        at += 12 + size
    _shuffled(parts, _KINDS, chance)
    out = [raw[:8]]
    for kind, data in parts:
        size = len(data) if chance.random() < 0.97 else chance.choice(NUMBERS) & 0xFFFFFFFF
        out.append(struct.pack(">I", size) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(out)


def _jpeg(raw: bytes, chance: random.Random) -> bytes:
    parts, at = [], 2
    while raw[at + 1] != 0xDA:  # the rest is the scan
        size = int.from_bytes(raw[at + 2 : at + 4], "big")
        parts.append((raw[at + 1 : at + 2], raw[at + 4 : at + 2 + size]))
        at += 2 + size
    _shuffled(parts, tuple(bytes([kind]) for kind in range(0xC0, 0xFF)), chance)
    out = [raw[:2]]
    for kind, data in parts:
        size = len(data) + 2 if chance.random() < 0.97 else chance.randrange(1 << 16)
        out.append(b"\xff" + kind + struct.pack(">H", min(size, 0xFFFF)) + data)
    return b"".join(out) + raw[at:]


def _webp(raw: bytes, chance: random.Random) -> bytes:
    parts, at = [], 12
    while at + 8 <= len(raw):
        size = int.from_bytes(raw[at + 4 : at + 8], "little")
        parts.append((raw[at : at + 4], raw[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    _shuffled(parts, _PARTS, chance)
    out = b""
    for kind, data in parts:
        size = len(data) if chance.random() < 0.97 else chance.choice(NUMBERS) & 0xFFFFFFFF
        out += kind + struct.pack("<I", size) + data + b"\0" * (len(data) % 2)
    size = len(out) + 4 if chance.random() < 0.95 else chance.choice(NUMBERS) & 0xFFFFFFFF
    return b"RIFF" + struct.pack("<I", size) + b"WEBP" + out


def _decode(cases: range, seed: int, figures: int) -> None:
    """Decode some cases under the limits of a request's picture, and write the figures to a descriptor."""
    from dvdquant.deploy.serve.request import decoding

    whole = pictures()
    decoding.limit_process(PIXELS)
    before, refused, slowest = peak(), 0, 0.0
    for index in cases:
        raw = changed_picture(whole, random.Random(f"{seed} {index}"))
        started = time.monotonic()
        try:
            file: IO[bytes] = io.BytesIO(decoding.answer(raw, NAME, PIXELS))
        except Exception as error:
            raise AssertionError(f"case {index} of seed {seed}: {raw[:200]!r}") from error
        slowest = max(slowest, time.monotonic() - started)
        try:
            decoding.result_of(file, NAME, PIXELS)
        except decoding.ShapeError as error:
            refused += 1
            words = str(error)
            assert words.startswith(NAME), words
            assert "within the time" not in words, f"case {index} of seed {seed}: no whole answer"
            assert len(words) < 1000, words
            assert words.isprintable() or not set(words) - set("\n") & set(map(chr, range(32))), words
    line = {"cases": len(cases), "refused": refused, "slowest": slowest, "grown": peak() - before}
    os.write(figures, json.dumps(line).encode() + b"\n")


def main(count: int, seed: int) -> int:
    """Decode so many cases, in processes one after the other; returns 1 where one of them failed."""
    from dvdquant.deploy.serve.request import decoding

    decoding.prepare()
    pictures()  # Pillow imports what it needs before the limits
    for first in range(0, count, IN_A_PROCESS):
        cases = range(first, min(count, first + IN_A_PROCESS))
        if (child := os.fork()) == 0:
            code = 1
            try:
                _decode(cases, seed, sys.stdout.fileno())
                code = 0
            except BaseException:  # noqa: BLE001  (printed, and the exit status says it)
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        if status := os.waitpid(child, 0)[1]:
            print(f"the process of the cases {cases} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
