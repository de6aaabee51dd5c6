"""What ``--lora`` asks for: a file, its scale, and the transformer that it goes to."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dvdquant.errors import UnsupportedError
from dvdquant.system.records import brief
from dvdquant.system.several import one_or_several
from dvdquant.text import shown

__all__ = ["LoraSpec", "parse_lora", "parse_loras"]

MAX_LORAS = 64
_FORM = "FILE, FILE:SCALE, or transformer_2=FILE:SCALE for the second transformer"
_COMPONENT = re.compile(r"(transformer(?:_\d+)?)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class LoraSpec:
    """One LoRA to fuse.

    Args:
        path: The safetensors file.
        scale: Its strength; the trained one is 1.
        component: The transformer it goes to; None is ``transformer``, or the only one there is.
    """

    path: Path
    scale: float = 1.0
    component: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UnsupportedError(
                f"the scale of the LoRA {shown(self.path)} is {self.scale}",
                available="a finite number",
                fix="leave it out for the strength that the LoRA was trained at, which is 1",
            )
        if not str(self.path).strip() or "\0" in str(self.path):
            raise UnsupportedError(f"{str(self.path)!r:.200} is no LoRA file", available=_FORM)


def parse_lora(text: str) -> LoraSpec:
    """Return what ``[COMPONENT=]FILE[:SCALE]`` asks for.

    A colon that is part of a file's name is taken as such where a file has this name.

    Args:
        text: The text as it is given on the command line.

    Raises:
        UnsupportedError: The file is missing in the text, or the scale is no finite number.
    """
    component, rest = None, text
    if (match := _COMPONENT.fullmatch(text)) and not os.path.lexists(text):
        component, rest = match[1], match[2]
    name, colon, tail = rest.rpartition(":")
    if not colon or "/" in tail or os.path.lexists(os.path.expanduser(rest)):
        return LoraSpec(_path(rest, text), 1.0, component)
    try:
        scale = float(tail)
    except ValueError:
        raise UnsupportedError(
            f"--lora is {shown(text)!r}: its scale {tail!r:.40} is no number", available=_FORM, fix="write FILE:0.8"
        ) from None
    return LoraSpec(_path(name, text), scale, component)


def parse_loras(value: str | Path | LoraSpec | Sequence[str | Path | LoraSpec]) -> tuple[LoraSpec, ...]:
    """Return the LoRAs that a caller names: texts as the command takes them, paths, or specs.

    Args:
        value: One of them, or a sequence.

    Raises:
        UnsupportedError: One of them is out of form or of another kind, or there are more than 64.
    """
    several = one_or_several(value)
    if len(several) > MAX_LORAS:
        raise UnsupportedError(f"{len(several)} LoRAs", available=f"up to {MAX_LORAS}", fix="leave some out")
    return tuple(_spec(one) for one in several)


def _spec(value: str | Path | LoraSpec) -> LoraSpec:
    if isinstance(value, LoraSpec):
        return value
    if not isinstance(value, (str, Path)):
        raise UnsupportedError(f"a LoRA is {brief(value)}", available=_FORM, fix="give the path of its file")
    return LoraSpec(_path(str(value), str(value))) if isinstance(value, Path) else parse_lora(value)


def _path(name: str, text: str) -> Path:
    if not name.strip() or "\0" in name:
        raise UnsupportedError(f"--lora is {shown(text)!r}, which names no file", available=_FORM)
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # no home folder to expand to
        raise UnsupportedError(f"--lora is {shown(text)!r}: {error}", fix="give the whole path") from error
