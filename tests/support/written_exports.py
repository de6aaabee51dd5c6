"""Exports of a few bytes, written by the transaction itself, and what a reader finds of them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.recipe import get_recipe

__all__ = [
    "KEY",
    "content",
    "export",
    "export_resumable",
    "hashes",
    "manifest",
    "names_in",
    "six_steps",
    "state",
    "state_of",
]


def manifest(**changes: Any) -> Manifest:
    """A complete manifest of two layers."""
    layer = {
        "name": "blocks.0.attn1.to_q+to_k",
        "members": ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k"],
        "features_in": 256,
        "features_out": 512,
        "rotation_block": 256,
        "relative_mse": 0.0123,
        "relative_mse_minmax": 0.0192,
    }
    values: dict[str, Any] = {
        "source": {"model": "/models/tiny", "class_name": "WanTransformer3DModel", "fingerprint": "f" * 64},
        "family": "wan",
        "config_sha256": "c" * 64,
        "recipe": get_recipe("w4a4").to_json(),
        "shapes": {
            "frames": [5, 5, 5],
            "height": [60, 60, 60],
            "width": [32, 104, 104],
            "text_tokens": 512,
            "batch": 1,
            "dtype": "bf16",
        },
        "layers": [layer, {**layer, "name": "blocks.0.ffn.net.2", "relative_mse": None}],
        "kept": ["proj_out"],
        "tools": {"torch": "2.13.0"},
    }
    return Manifest(**{**values, **changes})


def content(version: int) -> dict[str, bytes]:
    """The files of export number ``version``; one exists in every version, some only in the odd or the even ones."""
    body = f"version {version} ".encode() * 50
    files = {"weights.safetensors": body, "onnx/transformer_a4.onnx": body + b"a4", "config.json": body + b"c"}
    files["engines/rtx-8.9/a4.engine" if version % 2 else "engines/rtx-12.0/a8.engine"] = body + b"e"
    return files


def export(out: Path, version: int, *, finish: bool = True, **options: Any) -> None:
    """Export number ``version`` into ``out``."""
    with ExportTransaction(out, **options) as transaction:
        for name, body in content(version).items():
            transaction.path(name).write_bytes(body)
        if finish:
            transaction.commit(manifest(family=f"v{version}"))


def state(out: Path) -> dict[str, str] | None:
    """What a reader sees, by bytes on disk alone: {path: SHA-256} of an export that is whole, None where there is no
    manifest. Fails if a manifest stands beside files that are not its own."""
    path = out / "manifest.json"
    if not path.exists():
        return None
    data = json.loads(path.read_bytes())
    for name, listed in data["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == listed["sha256"], name
    return {name: listed["sha256"] for name, listed in data["files"].items()}


def state_of(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Every path at or below ``folder`` (no link followed) with its inode, mode, time and content; whatever it is."""
    found: dict[str, tuple[Any, ...]] = {}
    for place in (folder, *sorted(folder.rglob("*"))):
        info = place.lstat()
        content: Any = None
        if stat.S_ISREG(info.st_mode):
            content = place.read_bytes()
        elif stat.S_ISLNK(info.st_mode):
            content = os.readlink(place)
        found[str(place.relative_to(folder))] = (info.st_ino, info.st_mode, info.st_mtime_ns, content)
    return found


def hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(body).hexdigest() for name, body in files.items()}


def names_in(out: Path) -> set[str]:
    """Relative paths of all files below ``out``, and beside it what belongs to it."""
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() or path.is_symlink()}
    return found | {path.name for path in out.parent.glob(f".{out.name}.dvdquant-*")}


KEY = {"fingerprint": "f" * 64, "recipe": {"name": "w4a4", "weight": {"group_size": 32}}, "sm": ["8.9"]}


def six_steps(transaction: ExportTransaction, steps: int) -> list[int]:
    """Up to six steps of 100 bytes of one growing file, each noted in the journal; returns those that ran now."""
    ran, path = [], transaction.path("weights.safetensors", resumable=True)
    path.touch()
    for step in range(steps):
        if transaction.is_done(f"layer{step}"):
            assert transaction.data(f"layer{step}") == {"error": step / 7}
            continue
        with path.open("r+b") as file:
            file.seek(100 * step)
            file.write(bytes([step]) * 100)
        transaction.done(f"layer{step}", {"error": step / 7}, files=["weights.safetensors"])
        ran.append(step)
    transaction.path("half.onnx").write_bytes(b"half")  # neither resumable nor part of a finished step
    return ran


def export_resumable(out: Path, resume: bool = False) -> None:
    with ExportTransaction(out, key=KEY, resume=resume) as transaction:
        if not transaction.complete:
            six_steps(transaction, 3)
            transaction.commit(manifest())
