"""The files of a folder in the format of diffusers: its transformers, their config.json, the weights and their index.

What is missing or odd is named in the error, with what is there instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from dvdquant.checkpoint.formats.files import HALVES, halves, model_files
from dvdquant.checkpoint.formats.scaled_fp8 import is_modelopt_fp8
from dvdquant.checkpoint.formats.stored import ShardTensor
from dvdquant.checkpoint.formats.wan import is_original_config
from dvdquant.checkpoint.locate import CONVERT, PICKLED, recognize_file
from dvdquant.checkpoint.untrusted import FileIdentity, UntrustedFolder, few, fix_of, reason_of
from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.system.recognize import PICKLED_FILE, recognize_config, recognize_folder
from dvdquant.system.safetensors_reader import read_header_from

__all__ = [
    "INDEX",
    "MAX_INDEX",
    "SINGLE",
    "WEIGHTS",
    "has_weights",
    "is_shard",
    "read_config",
    "read_weights",
    "refuse_code",
    "refuse_scripts",
    "transformers_in",
]

WEIGHTS = "diffusion_pytorch_model"
SINGLE, INDEX = f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json"
MAX_INDEX = 64 << 20
"""The most bytes of config.json, model_index.json or an index of shards: an index names every tensor."""
MAX_SHARDS, MAX_TENSORS = 10_000, 200_000
"""More than any model has: the largest have some thousands of tensors."""
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,240}\.safetensors")
_SHARD_SERIES = re.compile(WEIGHTS + r"-\d+-of-\d+\.safetensors")
_VARIANT = re.compile(
    WEIGHTS
    + r"\.(?P<name>[A-Za-z0-9_]+)(-\d+-of-\d+)?\.safetensors|"
    + re.escape(INDEX.removesuffix("json"))
    + r"(?P<index>[A-Za-z0-9_]+)\.json"
)


def transformers_in(folder: UntrustedFolder) -> dict[str, str]:
    """Return the transformers of a pipeline by name, empty for a transformer folder: a folder and its slash, or a file.

    ``model_index.json`` has ``[library, class]`` or ``[null, null]`` for each of them. Without it, the folders that
    have a config count.

    Args:
        folder: The folder of a pipeline or of a transformer.

    Raises:
        CheckpointError: ``model_index.json`` cannot be used.
        UnsupportedError: The pipeline has no transformer.
    """
    path, name_of_one = folder.root / "model_index.json", re.compile(r"transformer(_\d+)?")
    if not folder.root.is_dir():
        return {}
    names = folder.names()
    if "model_index.json" not in names:
        if "config.json" in names:
            return {}
        inside = [name for name in names if name_of_one.fullmatch(name) and folder.has(f"{name}/config.json")]
        if inside:
            return {name: f"{name}/" for name in inside}
        if halves(folder):
            return {component: f"{half}/" for component, half in HALVES.items()}
        return model_files(folder, names)
    index, found = folder.json("model_index.json", MAX_INDEX), []
    for name, entry in index.items():
        if not name_of_one.fullmatch(name) or entry is None or entry == [None, None]:
            continue
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] != "diffusers":
            raise CheckpointError(f"{path}: {name:.80} is {entry!r:.200}", available="['diffusers', <class>]")
        found.append(name)
    if not found:
        what = "a pipeline with a UNet, as image models have it," if "unet" in index else "a pipeline"
        raise UnsupportedError(f"{folder.root} is {what} without a transformer", available=few(index, 12))
    return {name: f"{name}/" for name in found}


def read_config(folder: UntrustedFolder, names: list[str]) -> dict[str, Any]:
    """Return the content of ``config.json``, checked except for the fields of its class.

    Args:
        folder: The folder of the transformer.
        names: The names of its entries.

    Raises:
        CheckpointError: The file is missing or unusable, is of another format, or the folder asks for code of its own.
    """
    path = folder.root / "config.json"
    if "config.json" not in names:
        raise _no_config(folder, names)
    config = folder.json("config.json", MAX_INDEX)
    refuse_scripts(folder.root, names)
    refuse_code(config, path)
    if is_modelopt_fp8(config.get("quantization_config")):
        config = {name: value for name, value in config.items() if name != "quantization_config"}
    if is_original_config(config):
        return config
    if found := recognize_config(config):
        raise CheckpointError(f"{path} is of {found.what}", available=folder.listing(), fix=found.fix)
    name = config.get("_class_name")
    if not isinstance(name, str) or not name.isidentifier() or len(name) > 200:
        raise CheckpointError(f"{path} has the _class_name {name!r:.80}", available="a diffusers class name")
    return config


def _no_config(folder: UntrustedFolder, names: list[str]) -> CheckpointError:
    """Return the error for a folder without ``config.json``; it names the format of the folder if it is known."""
    weights = [name for name in names if name.endswith(".safetensors")]
    found = recognize_folder(names)
    if found is None:
        found = next((known for name in weights[:4] if (known := recognize_file(folder, name))), None)
    if found is not None:
        return CheckpointError(
            f"{folder.root} is no diffusers model, it has no config.json: it is {found.what}",
            available=folder.listing(),
            fix=found.fix,
        )
    fix = "give a transformer folder or a pipeline folder in diffusers format"
    if weights:
        fix = f"put the config.json of the same model beside {weights[0]!r:.200}, or give it with --config FILE"
    elif pickled := [name for name in names if name.endswith(PICKLED)]:
        fix = f"{pickled[0]!r:.200} holds pickled weights, which run code when loaded: {PICKLED_FILE}"
    return CheckpointError(
        f"{folder.root} is no diffusers model: it has no config.json", available=folder.listing(), fix=fix
    )


def refuse_scripts(root: Path, names: list[str]) -> None:
    """Refuse a folder that holds code: it is never run, and a model that needs it would be another one without it.

    Args:
        root: The folder, for the error.
        names: The names of its entries.

    Raises:
        CheckpointError: One of the names is that of code.
    """
    for name in names:
        if os.path.splitext(name)[1] in (".py", ".pyc", ".so"):
            raise CheckpointError(f"{root} holds code ({name!r:.200}), which is never run", fix="remove it")


def refuse_code(value: Any, path: Path) -> None:
    """Refuse a config that asks for code of its own, at any depth.

    Args:
        value: The config, or a value in it.
        path: The path of the file, for the error.

    Raises:
        CheckpointError: The config names a module or a Python file.
    """
    if isinstance(value, dict):
        if "auto_map" in value or "custom_pipelines" in value:
            raise CheckpointError(f"{path} asks for code of its own (auto_map), which is never run", fix="remove it")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            refuse_code(item, path)
    elif isinstance(value, str) and value.endswith(".py"):
        raise CheckpointError(f"{path} names a Python file ({value!r:.200}), which is never run", fix="remove it")


def is_shard(name: str) -> bool:
    """Return whether a file is by its name one of several shards.

    Args:
        name: The name of the file.
    """
    return _SHARD_SERIES.fullmatch(name) is not None


def has_weights(names: Iterable[str]) -> bool:
    """Return whether a folder has weights by the names of diffusers, complete or not.

    Args:
        names: The names of the folder's entries.
    """
    return any(name in (SINGLE, INDEX) or is_shard(name) or _VARIANT.fullmatch(name) for name in names)


def read_weights(
    folder: UntrustedFolder, names: list[str], top: UntrustedFolder
) -> tuple[dict[str, ShardTensor], dict[str, str], dict[str, FileIdentity]]:
    """Find the files of the weights, and check the header of each.

    Args:
        folder: The folder of the transformer.
        names: The names of its entries.
        top: The folder that was given as the model.

    Returns:
        The tensors by name, the SHA-256 of each header by file name, and the identity of each file by file name.

    Raises:
        CheckpointError: Files are missing, unusable, too many, in conflict with each other, or changed meanwhile.
    """
    # 1. Decide which files hold the weights: those of the index, or the single file.
    expected: dict[str, set[str]] | None = None
    where: dict[str, str] = {}
    series = [name for name in names if _SHARD_SERIES.fullmatch(name)]
    if INDEX in names:
        where = _read_index(folder)
        expected = {}
        for name, shard in where.items():
            expected.setdefault(shard, set()).add(name)
        shards = sorted(expected)
        if len(shards) > MAX_SHARDS:
            raise CheckpointError(
                f"{folder.root / INDEX} names {len(shards)} shards, more than {MAX_SHARDS}",
                fix="merge the shards, or give a download of the model with fewer of them",
            )
        if extra := next((name for name in series if name not in expected), None):
            raise CheckpointError(f"{folder.root / extra} is a shard that {INDEX} does not name", available=shards[:8])
        if SINGLE in names and SINGLE not in expected:
            raise _two_sets(folder, INDEX)
    elif SINGLE in names:
        shards = [SINGLE]
        if series:
            raise _two_sets(folder, series[0])
    else:
        raise _no_weights(folder, names, series)
    # 2. Open each file, check its header, and check that it is the same file afterwards.
    tensors: dict[str, ShardTensor] = {}
    headers: dict[str, str] = {}
    files: dict[str, FileIdentity] = {}
    for shard in shards:
        real = folder.locate(shard)
        try:
            fd = folder.open(shard)
        except FileNotFoundError as error:
            raise _no_shard(folder, shard, names, top) from error
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder.root / shard} is not a usable safetensors file: {reason_of(error)}",
                fix=fix_of(error, "download or convert the file again"),
            ) from error
        try:
            files[shard] = FileIdentity.of(fd)
            header = read_header_from(fd, real)
            if FileIdentity.of(fd) != files[shard]:
                raise CheckpointError(
                    f"{folder.root / shard} changed while it was read", fix="wait until it is written, then try again"
                )
        finally:
            os.close(fd)
        # 3. Collect its tensors, which must be those that the index names for this file.
        headers[shard] = header.digest
        if len(tensors) + len(header.tensors) > MAX_TENSORS:
            raise CheckpointError(
                f"{folder.root} holds more than {MAX_TENSORS} tensors", fix="give the folder of the transformer alone"
            )
        if expected is not None:
            _check_shard(folder.root / shard, header.tensors.keys(), expected[shard], where)
        for i in header.tensors.values():
            tensors[i.name] = ShardTensor(i.name, i.dtype, i.shape, i.offset, i.nbytes, real, shard)
    if not tensors:
        raise CheckpointError(f"{folder.root} holds no tensors", fix="download the model again")
    return tensors, headers, files


def _read_index(folder: UntrustedFolder) -> dict[str, str]:
    """Return the file name of each tensor, from the index of the shards.

    Raises:
        CheckpointError: The index cannot be used, names too many tensors, or names files that are no plain names.
    """
    path, weight_map = folder.root / INDEX, folder.json(INDEX, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} has no weight_map of tensor names to shard files",
            fix="download the index file again, or give the single safetensors file",
        )
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(
            f"{path} names {len(weight_map)} tensors, more than {MAX_TENSORS}",
            fix="give the transformer alone: an index of so many tensors is none of a model that is supported",
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{path}: tensor {name!r:.200} is said to lie in {shard!r:.200}", available="plain *.safetensors names"
            )
    return weight_map


def _check_shard(path: Path, held: Set[str], meant: Set[str], where: Mapping[str, str]) -> None:
    """Check that a shard holds exactly the tensors that the index says.

    Args:
        path: The path of the shard, for the error.
        held: The names of the tensors that it holds.
        meant: The names that the index gives for it.
        where: The file name of every tensor in the index.

    Raises:
        CheckpointError: It lacks a tensor, or holds one too many.
    """
    if missing := meant - held:
        raise CheckpointError(
            f"{path} lacks tensor {min(missing)!r:.200}, which {INDEX} says it holds",
            fix="download that shard and the index again: they are of different downloads",
        )
    if extra := held - meant:
        name = min(extra)
        should = f"lie in {where[name]}" if name in where else "not exist"
        raise CheckpointError(
            f"{path} holds tensor {name!r:.200}, which should {should} by {INDEX}",
            fix="download that shard and the index again: they are of different downloads",
        )


def _two_sets(folder: UntrustedFolder, other: str) -> CheckpointError:
    """Return the error for a folder with two sets of weights.

    Nothing says which of them is meant: the times of files do not survive a copy.
    """
    return CheckpointError(
        f"{folder.root} holds two sets of weights: {SINGLE} and the shards of {other}",
        fix=f"move one of them away: {SINGLE}, or {INDEX} and {WEIGHTS}-*-of-*.safetensors",
    )


def _no_shard(folder: UntrustedFolder, shard: str, names: list[str], top: UntrustedFolder) -> CheckpointError:
    """Return the error for a missing shard; it says if a download was interrupted."""
    if _is_interrupted(names, top):
        return CheckpointError(
            f"{folder.root} lacks the shard {shard}, and its download was interrupted",
            available=folder.listing(),
            fix="finish the download: hf download ORG/NAME --local-dir FOLDER",
        )
    return CheckpointError(
        f"{folder.root} lacks the shard {shard}", available=folder.listing(), fix="download it again"
    )


def _is_interrupted(names: list[str], top: UntrustedFolder) -> bool:
    """Return whether a tool for downloads left an unfinished file in the folder or in the places that the hub uses.

    Args:
        names: The names of the folder's entries.
        top: The folder that was given as the model.
    """
    places = [top.root / ".cache" / "huggingface" / "download", *top.allowed[1:]]
    places.append(places[0] / "transformer")
    if any(name.endswith((".incomplete", ".crdownload", ".aria2", ".part")) for name in names):
        return True
    for place in places:
        try:
            with os.scandir(place) as entries:
                if any(entry.name.endswith(".incomplete") for _, entry in zip(range(100_000), entries)):
                    return True
        except OSError:
            continue
    return False


def _no_weights(folder: UntrustedFolder, names: list[str], series: list[str]) -> CheckpointError:
    """Return the error for a folder without usable weights; it names what is there instead.

    Args:
        folder: The folder of the transformer.
        names: The names of its entries.
        series: Those of the names that are shards.
    """
    root, fix = folder.root, f"rename one set of weights to {SINGLE}, or add {INDEX}"
    if series:
        return CheckpointError(
            f"{root} holds shards ({series[0]}) and not their {INDEX}",
            available=few(names),
            fix=f"download {INDEX} too",
        )
    if variants := [match for name in names if (match := _VARIANT.fullmatch(name))]:
        variant = variants[0]["name"] or variants[0]["index"]
        fix = f"take the name .{variant} out of all of these files (and of those named in the index), or get {SINGLE}"
        what = f"{root} holds only the variant {variant!r}, neither {SINGLE} nor {INDEX}"
        return CheckpointError(what, available=few(match[0] for match in variants), fix=fix)
    if others := [name for name in names if name.endswith(".safetensors")]:
        if found := next((known for name in others[:4] if (known := recognize_file(folder, name))), None):
            return CheckpointError(f"{root} holds {found.what}", available=few(others), fix=found.fix)
        return CheckpointError(f"{root} has neither {SINGLE} nor {INDEX}", available=few(others), fix=fix)
    if found := recognize_folder(names):
        return CheckpointError(f"{root} has no weights: it is {found.what}", available=folder.listing(), fix=found.fix)
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        return CheckpointError(
            f"{root} holds only pickled weights ({pickled[0]!r:.200}), which run code when loaded",
            fix=CONVERT if pickled[0].startswith(WEIGHTS) else PICKLED_FILE,
        )
    if _is_interrupted(names, folder):
        fix = "finish the download: hf download ORG/NAME --local-dir FOLDER"
        return CheckpointError(f"{root} has no weights: a download was interrupted", available=few(names), fix=fix)
    return CheckpointError(f"{root} has no weights", available=folder.listing(), fix=f"add {SINGLE}")
