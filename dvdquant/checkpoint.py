"""The reader of diffusers checkpoints: everything is checked before a weight is used, and one tensor is read at a time.

A model folder may come from anywhere. Nothing in it is executed, nothing outside it is read, and only safetensors files
are opened (pickled weights run code when they are loaded).
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, UnsupportedError
from .files import disk_error, read_limited, strict_json
from .safetensors_io import TensorInfo, read_header, read_tensor

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "ShardTensor", "count_nonfinite", "open_checkpoint"]

WEIGHTS = "diffusion_pytorch_model"
SINGLE, INDEX = f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json"
MAX_JSON = 64 << 20
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,240}\.safetensors")
_SHARD_SERIES = re.compile(WEIGHTS + r"-\d+-of-\d+\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_PICKLED = (".bin", ".pt", ".ckpt", ".pth", ".pkl")
_CONVERT = (
    "convert them in a place you trust: from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)"
)


@dataclass(frozen=True)
class ShardTensor(TensorInfo):
    """A tensor of a checkpoint and the real path of the file that holds it."""

    path: Path = field(default=Path())


@dataclass(frozen=True)
class Checkpoint:
    """One transformer, opened and checked by :func:`open_checkpoint`; weights stay on disk until :meth:`read`.

    ``model`` is the argument as given, ``component`` the pipeline folder, ``root`` the real folder of the transformer,
    ``tensors`` every tensor by name, ``headers`` the SHA-256 of each file's header by file name.
    """

    model: str
    component: str
    root: Path
    config: dict[str, Any]
    tensors: dict[str, ShardTensor]
    headers: dict[str, str]

    @staticmethod
    def components(model: str | Path, *, revision: str | None = None) -> list[str]:
        """The transformers in a pipeline folder, ``["transformer", "transformer_2"]`` for Wan 2.2; in a plain
        transformer folder, ``["transformer"]``. CheckpointError as in :func:`open_checkpoint`."""
        root = locate_model(str(model), revision, ["model_index.json"])
        return _components(root) or ["transformer"]

    @property
    def class_name(self) -> str:
        """The diffusers class in ``config.json``."""
        return str(self.config["_class_name"])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def largest(self) -> ShardTensor:
        """The tensor that sets the peak of memory."""
        return max(self.tensors.values(), key=lambda info: info.nbytes)

    def read(self, name: str) -> torch.Tensor:
        """One tensor into private CPU memory, dtype and shape as stored; CheckpointError if absent or unreadable."""
        info = self.tensors.get(name)
        if info is None:
            near = difflib.get_close_matches(name, self.tensors, n=4) or sorted(self.tensors)[:4]
            raise CheckpointError(f"{self.root} has no tensor {name!r:.200}", available=near)
        return read_tensor(info.path, info)

    def fingerprint(self) -> str:
        """SHA-256 of config, header hashes, sizes and modification times: cheap, and enough to tell for ``--resume``
        that the same checkpoint lies there. It is no hash of the weights. CheckpointError if a file has gone."""
        rows: list[Any] = [json.dumps(self.config, sort_keys=True)]
        for name, digest in sorted(self.headers.items()):
            try:
                info = (self.root / name).stat()
            except OSError as error:
                raise CheckpointError(f"{self.root / name} has gone: {error.strerror}") from error
            rows.append([name, digest, info.st_size, info.st_mtime_ns])
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def check_finite(self, name: str, tensor: torch.Tensor) -> None:
        """CheckpointError with their count and the first index if ``tensor`` holds NaN or infinities."""
        count, first = count_nonfinite(tensor)
        if count:
            raise CheckpointError(
                f"{self.root}: tensor {name!r:.200} holds {count} NaN or infinite values of {tensor.numel()}, "
                f"the first at index {list(first)}",
                fix="download the weights again, or use --allow-nonfinite to go on and record them in the manifest",
            )

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], unused: Collection[str] = ()) -> None:
        """CheckpointError, listing up to five tensors, unless names and shapes are exactly those of ``expected``; tensors
        of ``unused`` may be there besides."""
        problems = [f"missing {name!r} {list(shape)}" for name, shape in expected.items() if name not in self.tensors]
        for name, info in self.tensors.items():
            if name in unused:
                continue
            if name not in expected:
                problems.append(f"unexpected {name!r:.200} {list(info.shape)}")
            elif info.shape != tuple(expected[name]):
                problems.append(f"{name!r} is {list(info.shape)}, {self.class_name} needs {list(expected[name])}")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"{self.root} does not fit its config.json: {'; '.join(problems[:5])}{more}",
                fix="use the config.json and the weights of one and the same model",
            )


def count_nonfinite(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """(number of NaN and infinite values, index of the first or ``()``) of a tensor of any dtype, in bounded memory."""
    import torch

    if not tensor.dtype.is_floating_point or not tensor.numel():
        return 0, ()
    count, first, flat, step = 0, -1, tensor.reshape(-1), 1 << 22
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        part = part.float() if part.element_size() == 1 else part
        # Extremes carry NaN and infinities, and finding them is one pass without an intermediate.
        finite = all(math.isfinite(extreme) for extreme in torch.aminmax(part))
        if not finite and (found := int((bad := ~torch.isfinite(part)).sum())):
            first = start + int(bad.nonzero()[0]) if first < 0 else first
            count += found
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)]
    return count, tuple(first // s % n for s, n in zip(strides, tensor.shape)) if count else ()


def open_checkpoint(
    model: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    component: str = "transformer",
) -> Checkpoint:
    """Open a transformer and check its config, index and every header, without reading a weight.

    Args:
        model: a transformer folder (``config.json`` and safetensors), a pipeline folder (with the transformer in
            ``transformer/``), or a hub id ``org/name``, of which only the config and the safetensors of the transformer
            are downloaded. What exists as a local path is never looked for elsewhere.
        subfolder: a folder inside ``model`` to look in. revision: of a hub id.
        component: the folder of a pipeline; :meth:`Checkpoint.components` lists them.

    Raises:
        CheckpointError: whatever is wrong with the folder, saying which file and tensor.
    """
    for part in (*(subfolder.split("/") if subfolder else ()), component):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part):
            raise CheckpointError(f"{part!r:.200} is no plain folder name", fix="name a folder inside the model")
    root = locate_model(str(model), revision, _patterns(subfolder, component))
    try:
        return _open(root, str(model), subfolder, component)
    except OSError as error:
        raise CheckpointError(f"{error.filename or model} cannot be read: {error.strerror or error}") from error


def _open(root: Path, model: str, subfolder: str | None, component: str) -> Checkpoint:
    allowed = allowed_folders(root)
    folder = real_path(root / subfolder, allowed) if subfolder else root
    if found := _components(folder):
        if component not in found:
            raise CheckpointError(f"{folder} has no component {component!r}", available=found)
        folder = real_path(folder / component, allowed)
    elif component != "transformer":
        raise CheckpointError(f"{folder} is not a pipeline and has no {component!r}", available=_entries(folder))
    if not folder.is_dir():
        fix = "give a folder of the model with --subfolder, or leave it out"
        raise CheckpointError(f"{folder} is missing", available=_entries(folder.parent), fix=fix)
    config = _read_config(folder, allowed)
    tensors, headers = _read_weights(folder, allowed)
    return Checkpoint(model, component, folder, config, tensors, headers)


def _patterns(subfolder: str | None, component: str) -> list[str]:
    names = ["config.json", SINGLE, INDEX, f"{WEIGHTS}-*-of-*.safetensors"]
    base = f"{subfolder}/" if subfolder else ""
    # The VAE's config tells the scale of the latents (dvdquant.pipeline_facts).
    return [f"{base}model_index.json", f"{base}vae/config.json"] + [
        f"{base}{folder}{name}" for folder in ("", f"{component}/") for name in names
    ]


def locate_model(model: str, revision: str | None, patterns: list[str]) -> Path:
    """The real local folder of a path or a hub id."""
    if "\0" in model or not model.strip():
        raise CheckpointError(f"{model!r:.200} is no model", fix="give a local folder or a hub id like org/name")
    try:
        path = Path(os.path.realpath(os.path.expanduser(model)))
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model!r:.200} cannot be opened: {error}") from error
    if exists:
        hint = _CONVERT if path.suffix in _PICKLED else "give the folder that holds config.json"
        raise CheckpointError(f"{model} is a file, not a model folder", fix=hint)
    if not _HUB_ID.fullmatch(model) or Path(model.split("/")[0]).is_dir():
        parent = next(place for place in path.parents if place.is_dir())
        raise CheckpointError(f"there is no folder {model!r:.300}", available=f"{parent} holds {_entries(parent)}")
    return _download(model, revision, patterns)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    local = "or give a local folder that holds the model"
    try:
        found = huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns)
    except Exception as error:  # the HTTP client underneath has its own classes, which differ between versions
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_error(error, f"the hub cache with {model}") from error
        if isinstance(error, GatedRepoError):
            what, fix = "may only be downloaded after its terms are accepted", f"accept them and log in, {local}"
        elif isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)):
            what, fix = f"(revision {revision}) is neither a local folder nor on the hub", f"check the name, {local}"
        else:
            what, fix = "is no local folder, and the hub gave nothing", f"connect, unset HF_HUB_OFFLINE, {local}"
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"model {model!r} {what} ({type(error).__name__}: {reason:.200})", fix=fix) from error
    return Path(os.path.realpath(found))


def allowed_folders(root: Path) -> list[Path]:
    """The real folders files may come from: the model's own, and the blobs of its repository in a hub cache."""
    for place in (root, *root.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            blobs = place.parent.parent / "blobs"
            return [root, blobs] if blobs.is_dir() and not blobs.is_symlink() else [root]
    return [root]


def real_path(path: Path, allowed: list[Path]) -> Path:
    """``path`` without links; CheckpointError if it leaves the allowed folders."""
    real = Path(os.path.realpath(path))
    if not any(folder in (real, *real.parents) for folder in allowed):
        raise CheckpointError(f"{path} is a link that reads outside the folder", fix="copy what it leads to into it")
    return real


def _entries(folder: Path) -> str:
    try:
        names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    except OSError as error:
        return str(error.strerror)
    return (
        ", ".join(f"{name!r}" for name in names[:10]) + (f" and {len(names) - 10} more" * (len(names) > 10))
        or "nothing"
    )


def _read_json(path: Path, allowed: list[Path]) -> dict[str, Any]:
    try:
        value = strict_json(read_limited(real_path(path, allowed), MAX_JSON))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be used: {reason}", fix="download the model again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object but {type(value).__name__}")
    return value


def _read_config(folder: Path, allowed: list[Path]) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} is no diffusers model: it has no config.json",
            available=_entries(folder),
            fix="give a transformer folder or a pipeline folder in diffusers format",
        )
    config = _read_json(path, allowed)
    if scripts := sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".py", ".pyc", ".so")):
        raise CheckpointError(f"{folder} holds code ({scripts[0]!r:.200}), which is never run", fix="remove it")
    _refuse_code(config, path)
    name = config.get("_class_name")
    if not isinstance(name, str) or not name.isidentifier():
        raise CheckpointError(f"{path} has the _class_name {name!r:.80}", available="a diffusers class name")
    return config


def _refuse_code(value: Any, path: Path) -> None:
    if isinstance(value, dict):
        if "auto_map" in value or "custom_pipelines" in value:
            raise CheckpointError(f"{path} asks for code of its own (auto_map), which is never run", fix="remove it")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _refuse_code(item, path)
    elif isinstance(value, str) and value.endswith(".py"):
        raise CheckpointError(f"{path} names a Python file ({value!r:.200}), which is never run", fix="remove it")


def _components(folder: Path) -> list[str]:
    """Names of the transformers of a pipeline, empty for a transformer folder.

    ``model_index.json`` has ``[library, class]`` or ``[null, null]`` for each; without it, folders with a config count.
    """
    path, name_of_one = folder / "model_index.json", re.compile(r"transformer(_\d+)?")
    if not path.exists():
        if not folder.is_dir() or (folder / "config.json").exists():
            return []
        return sorted(
            e.name for e in folder.iterdir() if name_of_one.fullmatch(e.name) and (e / "config.json").exists()
        )
    index, found = _read_json(path, allowed_folders(folder)), []
    for name, entry in index.items():
        if not name_of_one.fullmatch(name) or entry is None or entry == [None, None]:
            continue
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] != "diffusers":
            raise CheckpointError(f"{path}: {name} is {entry!r:.200}", available="['diffusers', <class>]")
        found.append(name)
    if not found:
        raise UnsupportedError(f"{folder} is a pipeline without a transformer", available=list(index)[:12])
    return found


def _read_weights(folder: Path, allowed: list[Path]) -> tuple[dict[str, ShardTensor], dict[str, str]]:
    names = sorted(entry.name for entry in folder.iterdir())
    weight_map: dict[str, str] | None = None
    if INDEX in names:
        weight_map = _read_index(folder / INDEX, allowed)
        shards = sorted(set(weight_map.values()))
        if extra := [n for n in names if _SHARD_SERIES.fullmatch(n) and n not in shards]:
            raise CheckpointError(f"{folder / extra[0]} is a shard that {INDEX} does not name", available=shards[:8])
    elif SINGLE in names:
        shards = [SINGLE]
    else:
        raise _no_weights(folder, names)
    tensors: dict[str, ShardTensor] = {}
    headers: dict[str, str] = {}
    for shard in shards:
        real = real_path(folder / shard, allowed)
        if not real.exists():
            raise CheckpointError(
                f"{folder} lacks the shard {shard}", available=_entries(folder), fix="download it again"
            )
        header = read_header(real)
        headers[shard] = header.digest
        if weight_map is not None:
            _check_shard(folder / shard, header.tensors, weight_map)
        tensors.update(
            (i.name, ShardTensor(i.name, i.dtype, i.shape, i.offset, i.nbytes, real)) for i in header.tensors.values()
        )
    if not tensors:
        raise CheckpointError(f"{folder} holds no tensors")
    return tensors, headers


def _no_weights(folder: Path, names: list[str]) -> CheckpointError:
    if others := [name for name in names if name.endswith(".safetensors")]:
        fix = f"rename one set of weights to {SINGLE}, or add {INDEX}"
        return CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}", available=others[:8], fix=fix)
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        return CheckpointError(
            f"{folder} holds only pickled weights ({pickled[0]!r:.200}), which run code when loaded",
            fix=_CONVERT,
        )
    return CheckpointError(f"{folder} has no weights", available=_entries(folder), fix=f"add {SINGLE}")


def _read_index(path: Path, allowed: list[Path]) -> dict[str, str]:
    weight_map = _read_json(path, allowed).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map of tensor names to shard files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{path}: tensor {name!r:.200} is said to lie in {shard!r:.200}", available="plain *.safetensors names"
            )
    return weight_map


def _check_shard(path: Path, tensors: Iterable[str], weight_map: dict[str, str]) -> None:
    """CheckpointError unless the shard holds exactly the tensors that the index says."""
    held, meant = set(tensors), {name for name, shard in weight_map.items() if shard == path.name}
    if missing := sorted(meant - held):
        raise CheckpointError(f"{path} lacks tensor {missing[0]!r:.200}, which {INDEX} says it holds")
    if extra := sorted(held - meant):
        where = f"lie in {weight_map[extra[0]]}" if extra[0] in weight_map else "not exist"
        raise CheckpointError(f"{path} holds tensor {extra[0]!r:.200}, which should {where} by {INDEX}")
