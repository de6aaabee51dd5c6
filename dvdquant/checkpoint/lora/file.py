"""A LoRA file, opened and checked. It may come from anybody: nothing in it is executed, and it costs no more than it holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dvdquant.checkpoint.untrusted import MAX_JSON, FileIdentity, UntrustedFolder, fix_of, reason_of
from dvdquant.errors import CheckpointError
from dvdquant.system.files import hash_descriptor, strict_json
from dvdquant.system.recognize import SNIFFED, recognize_bytes
from dvdquant.system.records import first_problem
from dvdquant.system.safetensors_reader import Header, TensorInfo, read_header_from, read_tensor_from
from dvdquant.text import shown

if TYPE_CHECKING:
    import torch

__all__ = ["OWN_FUSE", "AdapterSettings", "LoraFile"]

MAX_TENSORS = 50_000
"""More than any LoRA has: a file with three tensors for every layer of the largest models has some thousands."""
_ADAPTER = "adapter_config.json"
OWN_FUSE = "fuse it into the model with the tool that trained it, and export the folder without --lora"
_CONVERT = (
    "get it as safetensors, or convert it in a place you trust: "
    "save_file(torch.load(FILE, weights_only=True), 'lora.safetensors')"
)
_Strength = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]


class AdapterSettings(BaseModel):
    """The settings that PEFT records of an adapter, as far as the size of its changes depends on them."""

    model_config = ConfigDict(strict=True, extra="ignore")

    r: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    lora_alpha: _Strength | None = None
    alpha_pattern: dict[Annotated[str, Field(max_length=1000)], _Strength] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    peft_type: Annotated[str, Field(max_length=100)] | None = None

    def alpha(self, layer: str) -> float | None:
        """Return alpha of a layer, None where it is the rank: a name in ``alpha_pattern`` may be the end of the layer's.

        Args:
            layer: The dotted name of the layer.
        """
        for name, value in (self.alpha_pattern or {}).items():
            if layer == name or layer.endswith(f".{name}"):
                return value
        return self.lora_alpha


@dataclass(frozen=True)
class LoraFile:
    """The header of a LoRA file, checked; its tensors stay on disk. No descriptor is kept.

    Args:
        path: The path as it was given.
        folder: The folder in which the file really lies.
        name: The name of the file there.
        header: Its tensors and metadata.
        identity: What the file was when the header was read.
        settings: PEFT's, from the metadata or from ``adapter_config.json`` beside the file; None where there are none.
    """

    path: Path
    folder: UntrustedFolder
    name: str
    header: Header
    identity: FileIdentity
    settings: AdapterSettings | None

    @classmethod
    def open(cls, path: Path) -> LoraFile:
        """Open a file and check its header.

        Args:
            path: The path of the file.

        Raises:
            CheckpointError: It is missing, no safetensors file, or its metadata cannot be used.
        """
        real = Path(os.path.realpath(path))
        if real.is_dir():
            listing = UntrustedFolder.at(real).listing()
            raise CheckpointError(
                f"the LoRA {shown(path)} is a folder", available=listing, fix="give the safetensors file in it"
            )
        folder, name = UntrustedFolder.at(real.parent), real.name
        with _opened(path, folder, name) as fd:
            identity = FileIdentity.of(fd)
            try:
                found = recognize_bytes(os.pread(fd, SNIFFED, 0))
            except OSError as error:
                raise _unreadable(path, error) from error
            if found is not None:
                fix = {"pickled": _CONVERT, "not downloaded": found.fix, "foreign": "give a .safetensors file"}
                raise CheckpointError(
                    f"{shown(path)} is no LoRA in safetensors: it is {found.what}",
                    fix=fix[found.state],
                )
            header = read_header_from(fd, path)
        if len(header.tensors) > MAX_TENSORS:
            raise CheckpointError(
                f"{shown(path)} holds {len(header.tensors)} tensors, more than {MAX_TENSORS}",
                fix="give a LoRA of one model: this file holds more tensors than any trainer writes",
            )
        # A link of the hub's cache leads to a file without a name: the settings lie beside the link.
        settings = _settings(path, header, UntrustedFolder.at(path.parent))
        return cls(path, folder, name, header, identity, settings)

    def read(self, info: TensorInfo) -> torch.Tensor:
        """Return one tensor in fp32.

        Args:
            info: The place of the tensor in the file.

        Raises:
            CheckpointError: It cannot be read, or the file is another one by now.
        """
        with self._same() as fd:
            return read_tensor_from(fd, info, self.path).float()

    def digest(self) -> str:
        """Return the SHA-256 of the whole file. Raises as :meth:`read`."""
        with self._same() as fd:
            try:
                return hash_descriptor(fd)["sha256"]
            except OSError as error:
                raise _unreadable(self.path, error) from error

    @contextmanager
    def _same(self) -> Iterator[int]:
        """Yield a descriptor of the file whose header was checked, before and after the block."""
        with _opened(self.path, self.folder, self.name) as fd:
            self._require_same(fd)
            yield fd
            self._require_same(fd)

    def _require_same(self, fd: int) -> None:
        if FileIdentity.of(fd) != self.identity:
            raise CheckpointError(
                f"the LoRA {shown(self.path)} has changed since it was opened: it was written to or replaced",
                fix="leave it as it is while it is read, and start again",
            )


@contextmanager
def _opened(path: Path, folder: UntrustedFolder, name: str) -> Iterator[int]:
    try:
        fd = folder.open(name)
    except FileNotFoundError as error:
        available = folder.listing() if folder.root.is_dir() else f"{shown(folder.root)} does not exist"
        raise CheckpointError(
            f"there is no LoRA file {shown(path)}",
            available=available,
            fix="give the path of a safetensors file; one of the hub is fetched first: hf download ORG/NAME FILE",
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the LoRA {shown(path)} cannot be read: {reason_of(error)}",
        fix=fix_of(error, "give the path of a safetensors file"),
    )


def _settings(path: Path, header: Header, folder: UntrustedFolder) -> AdapterSettings | None:
    """PEFT's settings: diffusers keeps them in the metadata, PEFT in a file beside ``adapter_model.safetensors``."""
    where = shown(path)
    if text := header.metadata.get("lora_adapter_metadata"):
        where += " (lora_adapter_metadata)"
        if len(text) > MAX_JSON:
            raise CheckpointError(f"{where} has {len(text)} characters", available=f"up to {MAX_JSON}")
        try:
            data = strict_json(text.encode())
        except ValueError as error:
            raise CheckpointError(f"{where} is no JSON: {error}", fix="save the LoRA again") from error
    elif path.name == "adapter_model.safetensors" and folder.has(_ADAPTER):
        where = shown(folder.root / _ADAPTER)
        data = folder.json(_ADAPTER, MAX_JSON, "get the LoRA's folder again")
    else:
        return None
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} is not a JSON object", fix="save the LoRA again")
    return _checked(data, where)


def _checked(data: dict[str, Any], where: str) -> AdapterSettings:
    # A pipeline has those of each of its parts, as transformer.r; the parts of a text encoder do not concern us.
    fields = AdapterSettings.model_fields
    own = {name.rpartition(".")[2]: value for name, value in data.items() if not name.startswith("text_encoder")}
    try:
        settings = AdapterSettings.model_validate({name: own[name] for name in fields if name in own})
    except ValidationError as error:
        problem = first_problem(error, own)
        raise CheckpointError(
            f"{where}: field {problem.field} {problem.state}", available=problem.allowed, fix="save the LoRA again"
        ) from error
    if settings.use_dora:
        raise CheckpointError(f"{where} says it is a DoRA, which is not fused here", fix=OWN_FUSE)
    if settings.peft_type not in (None, "LORA"):
        raise CheckpointError(f"{where} says it is a {settings.peft_type}", available="LORA", fix=OWN_FUSE)
    for name in settings.alpha_pattern or {}:
        if not all(c.isalnum() or c in "._-" for c in name):
            raise CheckpointError(
                f"{where}: alpha_pattern holds the regular expression {name!r:.100}",
                available="names of layers",
                fix=OWN_FUSE,
            )
    return settings
