"""Errors as a client may read them: in the names of the interface, and without any path of this machine."""

from __future__ import annotations

import re

from dvdquant.deploy.serve.jobs import Failure
from dvdquant.errors import DvdquantError
from dvdquant.system.out_of_memory import is_out_of_memory
from dvdquant.text import shown

__all__ = ["client_text", "failure_of", "public_error", "public_text"]

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


def failure_of(error: Exception) -> Failure:
    """Return what a client reads of a job that failed; of an error that is not ours, the log alone has the text.

    Args:
        error: The error that ended the job.
    """
    if isinstance(error, DvdquantError):
        return Failure(_code(error), public_text(error, "\n"))
    if is_out_of_memory(error):
        return Failure(
            "out_of_memory", "the device has not enough memory for this clip; ask for a smaller or shorter one"
        )
    return Failure(
        "internal_error", client_text(f"the clip failed with {type(error).__name__}; the server's log says more")
    )


def _code(error: DvdquantError) -> str:
    """Return ``engine_error`` for EngineError."""
    name = type(error).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
