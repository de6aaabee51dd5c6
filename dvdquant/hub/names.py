"""Names of repositories, and what an error of the hub means in words."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from dvdquant.errors import DvdquantError, OutputError
from dvdquant.system.files import disk_error
from dvdquant.system.hub_client import EndlessAnswerError
from dvdquant.text import message_of

__all__ = ["hub_failure", "is_hub_name", "require_hub_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_LOG_IN = "log in with hf auth login, or set HF_TOKEN to a token"


def is_hub_name(text: str) -> bool:
    """Return whether a text can only mean a repository: it is one's name, and no path that begins where a folder is.

    Args:
        text: A path or a name.
    """
    return bool(_NAME.fullmatch(text)) and not os.path.lexists(text) and not Path(text.split("/")[0]).is_dir()


def require_hub_name(text: str) -> str:
    """Return the name of a repository.

    Args:
        text: The name.

    Raises:
        OutputError: It is no name of a repository.
    """
    if not _NAME.fullmatch(text) or ".." in text or "--" in text or text.endswith((".git", ".", "-")):
        raise OutputError(
            f"{text!r:.200} is no name of a repository",
            available="user/name, with letters, digits, and single - . _ between them",
            fix="write it as it is in the address of the repository's page",
        )
    return text


def hub_failure(error: Exception, repo: str, revision: str | None, task: str) -> DvdquantError:
    """Return the error in words for a failure of the hub's client.

    Args:
        error: The failure.
        repo: The name of the repository.
        revision: The revision that was asked for, or None.
        task: What was done, such as "read".
    """
    from huggingface_hub import errors

    if isinstance(error, DvdquantError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_error(error, f"the hub cache with {repo}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = message_of(error)
    detail = f"{type(error).__name__}: {reason}"
    if isinstance(error, errors.GatedRepoError):
        return OutputError(
            f"{repo} asks to accept its terms first ({detail})", fix="accept them on its page, and log in"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return OutputError(f"{repo} has no revision {revision!r:.100}", fix="give a branch, a tag or a commit of it")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return OutputError(
            f"{repo} is neither a folder nor a repository that you may {task} ({detail})",
            available=f"the working directory is {Path.cwd()}",
            fix=f"check the name; if it is private, {_LOG_IN}",
        )
    if status in (401, 403):
        return OutputError(f"the hub refuses to {task} {repo} ({detail})", fix=f"{_LOG_IN} that may {task} it")
    if isinstance(error, EndlessAnswerError):
        return OutputError(
            f"the hub does not come to an end with {repo}: {reason}", fix="check HF_ENDPOINT, and try again"
        )
    if task == "write":
        return OutputError(
            f"the hub does not answer, or fails, while {repo} is written ({detail})",
            fix="push again: what has arrived is not sent twice, and the repository holds the old export or the new one, whole",
        )
    return OutputError(
        f"{repo} is no folder, and the hub does not answer ({detail})",
        fix="connect, unset HF_HUB_OFFLINE, or give a folder; what was downloaded before is read without a connection",
    )
