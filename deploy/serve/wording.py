"""Errors as a client may read them: in the names of the interface, and without any path of this machine."""

from __future__ import annotations

import re

from dvdquant.errors import DvdquantError
from dvdquant.text import shown

__all__ = ["client_text", "public_error", "public_text"]

_LONGEST = 1500  # characters
_NAMES = {
    "--negative-prompt": "negative_prompt",
    "--average-bits": "average_bits",
    "--last-image": "last_reference",
    "--num-frames": "num_frames",
    "--guidance": "guidance_scale",
    "--schedule": "schedule",
    "--height": "height",
    "--prompt": "prompt",
    "--image": "input_reference",
    "--steps": "num_inference_steps",
    "--width": "width",
    "--delta": "delta",
    "--cache": "cache",
    "--cache-policy": "cache_policy",
    "--seed": "seed",
    "--mode": "mode",
    "--fps": "fps",
}
# An absolute path of two parts or more; what it ends in stays.
_PATH = re.compile(r"(?<![\w/.~])~?/(?:[^\s/'\"`:;,()<>|]+/)+([^\s/'\"`:;,()<>|]*)")
_OPTION = re.compile("|".join(re.escape(name) + r"(?![\w-])" for name in _NAMES))


def client_text(text: str) -> str:
    """Return a text for a client: options by the names of the interface, of absolute paths only the last part.

    Args:
        text: A text of our own, which may quote anything.
    """
    text = _OPTION.sub(lambda match: _NAMES[match[0]], _PATH.sub(r"\1", text))
    return shown(text, _LONGEST, keep="\n")


def public_error(error: DvdquantError) -> dict[str, str | None]:
    """Return what an error says, part by part, for a client.

    Args:
        error: The error.
    """
    return {
        "message": client_text(error.what),
        "available": None if error.available is None else client_text(error.available),
        "fix": None if error.fix is None else client_text(error.fix),
    }


def public_text(error: DvdquantError, between: str) -> str:
    """Return what an error says as one text for a client, such as ``what; available: ...; fix: ...``.

    Args:
        error: The error.
        between: What parts it.
    """
    said = public_error(error)
    return between.join(f"{name}: {value}" if name != "message" else value for name, value in said.items() if value)
