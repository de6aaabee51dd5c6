"""Where an export lies: a folder, or a repository of the hub, which is downloaded and compared with its manifest.

The hub's cache is made of links, and an export is read without any. So its files get a second name in a folder of their
own beside the cache: hard links where the file system has them, else copies.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from dvdquant.artifact.layout import MANIFEST
from dvdquant.artifact.manifest import MAX_MANIFEST, Manifest
from dvdquant.artifact.verify_files import verify_files
from dvdquant.errors import OutputError
from dvdquant.hub.names import hub_failure, is_hub_name
from dvdquant.system.files import read_limited
from dvdquant.system.hub_client import one_listing
from dvdquant.system.whole_file import atomic_folder
from dvdquant.text import amount, first_of, shown

__all__ = ["differences", "listing", "locate_export"]

log = logging.getLogger(__name__)
MAX_ENTRIES = 20_000
_PLACE = "dvdquant"  # below the folder of the hub's caches


def locate_export(out: str | Path, revision: str | None = None) -> Path:
    """Return the folder of an export: a local one as it is, a repository of the hub after download and check.

    Without a connection, what an earlier call has downloaded is returned.

    Args:
        out: A folder, or the name of a repository, ``user/name``. A path that begins with an existing folder is no name.
        revision: The branch, tag or commit of a repository; None takes its newest.

    Raises:
        OutputError: A revision is given for a folder, the repository is unknown or no export, its files are not those of
            its manifest, or the hub does not answer.
        ResourceError: The disk is full.
    """
    name = os.fspath(out)
    if not is_hub_name(name):
        if revision is not None:
            raise OutputError(
                f"{shown(name)} is a folder, and a revision is for a repository of the hub",
                fix="leave the revision out, or give user/name",
            )
        return Path(out)
    return _download(name, revision)


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub

    # 1. The manifest, which fixes the commit.
    try:
        with one_listing():
            first = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=[MANIFEST]))
        commit = first.name
        manifest = _manifest(repo, first)
        place = _place(repo, commit)
        if _is_whole(place, first):
            return place
        # 2. What the hub says of the files, before gigabytes are fetched.
        _compare(repo, commit, manifest)
        # 3. The files that the manifest lists, and no other.
        patterns = [glob.escape(name) for name in (MANIFEST, *manifest.files)]
        log.info("downloading %s: %s", repo, amount(sum(entry["bytes"] for entry in manifest.files.values())))
        with one_listing():
            snapshot = Path(huggingface_hub.snapshot_download(repo, revision=commit, allow_patterns=patterns))
    except Exception as error:  # the HTTP client underneath has its own classes, which differ between versions
        raise hub_failure(error, repo, revision, "read") from error
    return _without_links(repo, snapshot, manifest, place)


def _manifest(repo: str, snapshot: Path) -> Manifest:
    """Return the manifest of a snapshot.

    Raises:
        OutputError: The repository is no export, or its manifest is out of form.
    """
    path = snapshot / MANIFEST
    if not path.is_file():
        raise OutputError(
            f"the repository {repo} is no export of dvdquant: it has no {MANIFEST}",
            fix="give the repository of an export; a model is exported with dvdq-export first",
        )
    try:
        return Manifest.from_json(read_limited(path, MAX_MANIFEST))
    except ValueError as error:
        raise OutputError(f"{MANIFEST} of {repo} cannot be read: {error}", fix="tell its author") from error


def _compare(repo: str, commit: str, manifest: Manifest) -> None:
    """Refuse a repository whose files cannot be those of its manifest.

    Raises:
        OutputError: A file is missing or another one.
    """
    if problems := differences(repo, commit, manifest):
        raise OutputError(
            f"the repository {repo} does not match its manifest: {first_of(problems)}",
            fix="take another revision, or tell its author to push the export again with dvdq-push",
        )


def differences(repo: str, commit: str, manifest: Manifest) -> list[str]:
    """Return what tells a commit's files from those of a manifest, by size and by the hub's own SHA-256.

    Args:
        repo: The name of the repository.
        commit: The commit.
        manifest: The manifest that lists the files.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return []
    there = listing(repo, commit)
    problems = []
    for name, entry in manifest.files.items():
        found = there.get(name)
        if found is None:
            problems.append(f"{name} is missing")
        elif found.size != entry["bytes"]:
            problems.append(f"{name} has {found.size} bytes instead of {entry['bytes']}")
        elif found.lfs is not None and found.lfs.sha256 != entry["sha256"]:
            problems.append(f"{name} has another SHA-256")
    return problems


def listing(repo: str, revision: str | None) -> dict[str, Any]:
    """Return the files of a repository by their names, as the hub says them: ``size`` in bytes, ``lfs`` with the SHA-256.

    Args:
        repo: The name of the repository.
        revision: The branch, tag or commit; None is the main branch.

    Raises:
        OutputError: There is no end of files.
    """
    import huggingface_hub

    tree = huggingface_hub.HfApi().list_repo_tree(repo, recursive=True, revision=revision)
    files = {}
    with one_listing():
        for count, entry in enumerate(tree):  # page by page; the hub says whether there is another one
            if count >= MAX_ENTRIES:
                raise OutputError(
                    f"the repository {repo} has more than {MAX_ENTRIES} files and folders",
                    fix="give a repository that holds one export",
                )
            if isinstance(entry, huggingface_hub.hf_api.RepoFile):
                files[entry.path] = entry
    return files


def _place(repo: str, commit: str) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.constants.HF_HOME) / _PLACE / repo.replace("/", "--") / commit


def _is_whole(place: Path, snapshot: Path) -> bool:
    """Return whether the folder is there; it is made whole or not at all. What runs is hashed again when it is loaded."""
    try:
        same = read_limited(place / MANIFEST, MAX_MANIFEST) == read_limited(snapshot / MANIFEST, MAX_MANIFEST)
    except (OSError, ValueError):
        return False
    return same


def _without_links(repo: str, snapshot: Path, manifest: Manifest, place: Path) -> Path:
    """Return a folder with the files of a snapshot as plain files, compared with the manifest.

    Raises:
        OutputError: A file is not the manifest's, or lies outside of the repository's cache, or the folder cannot be made.
        ResourceError: The disk is full.
    """
    cache = os.path.realpath(snapshot.parent.parent)
    with atomic_folder(place) as work:
        for name in (MANIFEST, *manifest.files):
            source = os.path.realpath(snapshot / name)
            if os.path.commonpath([source, cache]) != cache:
                raise OutputError(
                    f"{snapshot / name} points out of the hub's cache", fix=f"remove {cache}, then try again"
                )
            target = work / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(source, target)
        try:
            verify_files(work, manifest)
        except OutputError as error:
            raise OutputError(
                error.what.replace(str(work), f"what was downloaded of {repo}"),
                fix=f"remove {cache}, then try again; if it stays so, tell the author",
            ) from error
        if not _is_whole(place, snapshot):  # what another process has made whole meanwhile is in use there
            shutil.rmtree(place, ignore_errors=True)
    return place
