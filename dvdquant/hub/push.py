"""Putting an export on the hub: the files of its manifest, a card, in one commit.

The manifest on the hub differs from the local one in two things: it lists the card of the repository, and paths of this
machine are shortened to their last part. Everything else is what was exported, byte by byte.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvdquant.artifact.layout import MANIFEST
from dvdquant.artifact.manifest import MAX_MANIFEST, Manifest, load_manifest
from dvdquant.artifact.provenance import model_name
from dvdquant.artifact.verify_files import read_verified, verify_files
from dvdquant.errors import DvdquantError, OutputError
from dvdquant.hub.card import CARD, hub_card
from dvdquant.hub.locate import differences, listing
from dvdquant.hub.names import hub_failure, is_hub_name, require_hub_name
from dvdquant.system.files import read_limited
from dvdquant.system.hub_client import limit_waiting
from dvdquant.text import amount, shown

__all__ = ["PushPlan", "Pushed", "plan_push", "push"]

log = logging.getLogger(__name__)
SMALL = 1 << 20  # bytes; smaller files are held in memory as they were hashed


@dataclass(frozen=True)
class PushPlan:
    """The files and the card that a push would send.

    Args:
        out: The export folder.
        repo: The name of the repository.
        manifest: The manifest as the repository will have it.
        card: The text of the repository's card.
        private: Whether a new repository is private.
    """

    out: Path
    repo: str
    manifest: Manifest
    card: str
    private: bool

    @property
    def files(self) -> dict[str, int]:
        """Return name and size in bytes of every file that is sent."""
        sizes = {name: entry["bytes"] for name, entry in self.manifest.files.items()}
        return {**sizes, MANIFEST: len(self.manifest.to_json().encode())}


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Args:
        url: The address of the commit.
        commit: Its id.
        removed: Files of an earlier export that were removed.
    """

    url: str
    commit: str
    removed: tuple[str, ...]


def plan_push(
    out: str | Path,
    repo: str,
    *,
    private: bool = False,
    tags: Sequence[str] = (),
    license: str | None = None,
    base_model: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> PushPlan:
    """Check every file of an export, and return what a push would send. Nothing is sent and no token is needed.

    Args:
        out: The export folder.
        repo: The name of the repository, ``user/name``.
        private: Whether a new repository is private.
        tags: More tags for the card.
        license: The license of the model, by the hub's name for it; None leaves it out.
        base_model: The repository of the model; None takes what was exported, if that was a repository.
        progress: A function that gets the size in bytes of every block that is hashed.

    Raises:
        OutputError: The folder is no export, a file is not its manifest's, or the name is none of a repository.
    """
    require_hub_name(repo)
    root = Path(out)
    manifest = load_manifest(root)
    verify_files(root, manifest, progress=progress)
    body = read_verified(root, manifest, CARD).decode("utf-8", "replace") if CARD in manifest.files else ""
    public = _public(manifest)
    if base_model is not None:
        require_hub_name(base_model)
    elif is_hub_name(manifest.source["model"]):
        base_model = manifest.source["model"]
    card = hub_card(public, body, repo, tags=tags, license=license, base_model=base_model)
    raw = card.encode()
    files: dict[str, Any] = {**public.files, CARD: {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}}
    return PushPlan(root, repo, dataclasses.replace(public, files=dict(sorted(files.items()))), card, private)


def push(plan: PushPlan, *, revision: str | None = None, message: str | None = None, force: bool = False) -> Pushed:
    """Send an export to the hub, in one commit: the repository has the old export or the new one.

    Args:
        plan: The result of :func:`plan_push`.
        revision: The branch; None is the main one.
        message: The message of the commit.
        force: Replace another model's export, or the other files of the repository.

    Raises:
        OutputError: There is no token, the repository holds something else, a file has changed since it was checked, or
            the hub refuses.
    """
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise OutputError(
            f"there is no token of the hub, which a push to {plan.repo} needs",
            fix="log in with hf auth login, or set HF_TOKEN to a token that may write; --dry-run needs none",
        )
    limit_waiting()
    api = huggingface_hub.HfApi()
    try:
        # 1. The repository, and what is in it.
        api.create_repo(plan.repo, private=plan.private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(plan.repo, branch=revision, exist_ok=True)
        there = {name: entry.size for name, entry in listing(plan.repo, revision).items() if name != ".gitattributes"}
        stale = _stale(plan, there, revision, force)
        # 2. The files. Large ones are hashed while they are sent, so their digests are known before the commit.
        additions = [_addition(plan, name) for name in plan.files]
        api.preupload_lfs_files(plan.repo, additions=additions, revision=revision, free_memory=False)
        for addition in additions:
            _require_same(plan, addition)
        # 3. One commit, and what the hub says it has now.
        removals = [huggingface_hub.CommitOperationDelete(name) for name in stale]
        words = message or f"dvdquant export, recipe {plan.manifest.recipe['name']}"
        done = api.create_commit(plan.repo, [*additions, *removals], commit_message=words, revision=revision)
        if problems := differences(plan.repo, str(done.oid), plan.manifest):
            raise OutputError(
                f"the hub has other files in {plan.repo} than were sent: {'; '.join(problems[:5])}",
                fix="push again; if it stays so, the hub is at fault",
            )
    except DvdquantError:
        raise
    except Exception as error:  # the HTTP client underneath has its own classes, which differ between versions
        raise hub_failure(error, plan.repo, revision, "write") from error
    return Pushed(shown(done.commit_url, 300), shown(done.oid, 100), tuple(stale))


def _public(manifest: Manifest) -> Manifest:
    """Return the manifest without the paths of this machine."""
    source: Any = copy.deepcopy(manifest.source)
    for key in ("model", "transformer_2", "config"):
        if key in source and not is_hub_name(source[key]):
            source[key] = _last_part(source[key])
    lora: Any = tuple({**entry, "path": _last_part(entry["path"])} for entry in manifest.lora)
    return dataclasses.replace(manifest, source=source, lora=lora)


def _last_part(path: str) -> str:
    """Return the last part of a path. Two parts would look like the name of somebody's repository."""
    return model_name(path).split("/")[-1]


def _stale(plan: PushPlan, there: dict[str, int], revision: str | None, force: bool) -> list[str]:
    """Return the files of an earlier export that the new one does not have.

    Raises:
        OutputError: The repository holds another model's export, or no export, and ``force`` is not set.
    """
    import huggingface_hub

    if not there:
        return []
    old: Manifest | None = None
    if there.get(MANIFEST, MAX_MANIFEST + 1) <= MAX_MANIFEST:
        path = huggingface_hub.hf_hub_download(plan.repo, MANIFEST, revision=revision)
        try:
            old = Manifest.from_json(read_limited(Path(path), MAX_MANIFEST))
        except (OutputError, ValueError):
            log.warning("%s has a %s that is none of dvdquant's", plan.repo, MANIFEST)
    if old is None and there.keys() - {CARD} and not force:
        raise OutputError(
            f"the repository {plan.repo} holds {len(there)} files and no export of dvdquant",
            available=", ".join(shown(name, 100) for name in sorted(there)[:6]),
            fix="give another name, or --force to add the export to it",
        )
    if old is not None and old.source["fingerprint"] != plan.manifest.source["fingerprint"] and not force:
        raise OutputError(
            f"the repository {plan.repo} holds an export of {shown(old.source['model'], 200)}, another model",
            fix="give another name, or --force to replace it",
        )
    return sorted((set(old.files) & there.keys()) - set(plan.files)) if old is not None else []


def _addition(plan: PushPlan, name: str) -> Any:
    """Return the hub client's operation for one file. Small files are those bytes that were hashed."""
    from huggingface_hub import CommitOperationAdd

    if name == MANIFEST:
        return CommitOperationAdd(name, plan.manifest.to_json().encode())
    if name == CARD:
        return CommitOperationAdd(name, plan.card.encode())
    if plan.manifest.files[name]["bytes"] <= SMALL:
        return CommitOperationAdd(name, read_verified(plan.out, plan.manifest, name))
    return CommitOperationAdd(name, str((plan.out / name).absolute()))


def _require_same(plan: PushPlan, addition: Any) -> None:
    """Refuse a file that changed between the check and the upload.

    Raises:
        OutputError: What was sent is not what the manifest lists.
    """
    name, info = addition.path_in_repo, addition.upload_info
    if name in (MANIFEST, CARD):
        return
    entry = plan.manifest.files[name]
    digest = info.sha256.hex() if info.is_hashed else None
    if digest is None:  # a file that the hub takes inside of the commit
        if not isinstance(addition.path_or_fileobj, bytes):
            verify_files(plan.out, plan.manifest, [name])
        return
    if digest != entry["sha256"] or info.size != entry["bytes"]:
        raise OutputError(
            f"{name} changed while it was sent: it has {amount(info.size)}",
            fix="end what writes into the export, check it with dvdq-inspect --check, and push again",
        )
