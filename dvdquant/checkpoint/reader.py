"""The reader of diffusers checkpoints: everything is checked before a weight is used, and one tensor is read at a time.

A model folder may come from anywhere. Nothing in it is executed, nothing outside it is read, and only safetensors files
are opened (pickled weights run code when they are loaded). A file that is no longer the one whose header was checked is
refused when it is read, so a checkpoint never mixes two models.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdquant.checkpoint.diffusers_folder import transformers_in
from dvdquant.checkpoint.formats.files import HALVES, names_file
from dvdquant.checkpoint.formats.stored import ShardTensor, decode
from dvdquant.checkpoint.formats.translate import SourceFormat
from dvdquant.checkpoint.locate import locate_model
from dvdquant.checkpoint.untrusted import FileIdentity, UntrustedFolder, fix_of, reason_of
from dvdquant.errors import CheckpointError
from dvdquant.system.safetensors_reader import read_header_from, read_tensor_from

if TYPE_CHECKING:
    import torch

    from dvdquant.checkpoint.lora.terms import Loras

__all__ = ["Checkpoint", "ShardTensor", "count_nonfinite", "fingerprint_hint"]

FINGERPRINT = "v2-"
"""How a fingerprint starts that holds no times. Those without it are of releases that hashed modification times."""
SAMPLE = 4096
"""Bytes in the middle of each tensor that are part of a fingerprint."""


@dataclass(frozen=True)
class Checkpoint:
    """One transformer, opened and checked by :func:`open_checkpoint`; weights stay on disk until :meth:`read`.

    No descriptor is kept, so hundreds of shards need none, and a checkpoint can be pickled.

    Args:
        model: The model as it was given to :func:`open_checkpoint`.
        component: The folder of the pipeline that the transformer is in.
        root: The real folder of the transformer.
        config: The content of its ``config.json``.
        tensors: Every tensor by name.
        headers: The SHA-256 of each file's header, by file name.
        folder: The same folder as ``root``, with the places that its files may lie in.
        files: The identity of each file when its header was checked, by file name. Nothing is read from a file that has
            changed since.
        lora: LoRAs that :meth:`read` adds to the weights (:mod:`dvdquant.checkpoint.lora.fuse`).
        samples: The SHA-256 of the bytes that :meth:`fingerprint` read of each file, by file name.
        source: The format that was recognised. Names and shapes are those of diffusers, whatever the files have.
    """

    model: str
    component: str
    root: Path
    config: dict[str, Any]
    tensors: dict[str, ShardTensor]
    headers: dict[str, str]
    folder: UntrustedFolder
    files: dict[str, FileIdentity]
    lora: Loras | None = None
    samples: dict[str, bytes] = field(default_factory=dict, compare=False)
    source: SourceFormat = field(default_factory=SourceFormat)

    @staticmethod
    def components(model: str | Path, *, revision: str | None = None) -> list[str]:
        """Return the transformers in a model folder.

        Args:
            model: A local folder, a single file, or a hub id.
            revision: The revision of a hub id.

        Returns:
            The names of their folders: ``["transformer", "transformer_2"]`` for a pipeline of Wan 2.2,
            ``["transformer"]`` for a plain transformer folder or a single file.

        Raises:
            CheckpointError: There is no such folder, or its ``model_index.json`` cannot be used.
            UnsupportedError: It is a pipeline without a transformer.
        """
        if names_file(str(model)):
            return ["transformer"]
        wanted = ["model_index.json", *(f"{half}/config.json" for half in HALVES.values())]
        folder = UntrustedFolder.at(locate_model(str(model), revision, wanted))
        return list(transformers_in(folder)) or ["transformer"]

    @property
    def class_name(self) -> str:
        """Return the diffusers class in ``config.json``."""
        return str(self.config["_class_name"])

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def largest(self) -> ShardTensor:
        """Return the largest tensor, which decides the peak of memory."""
        return max(self.tensors.values(), key=lambda info: info.nbytes)

    @property
    def place(self) -> Path:
        """Return the folder, or the single file, that the transformer lies in."""
        return self.root / self.source.file

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into private CPU memory, dtype and shape as stored.

        It is fp32 where it is stored with a scale or in blocks, and where a LoRA changes it.

        Args:
            name: The name of the tensor.

        Raises:
            CheckpointError: The tensor is absent or unreadable, or its file has changed since it was opened.
            ResourceError: There is not enough memory for the tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            short = [other for _, other in zip(range(5000), self.tensors) if len(other) <= 200]
            near = difflib.get_close_matches(name[:200], short, n=4) or sorted(short)[:4]
            raise CheckpointError(f"{self.root} has no tensor {name!r:.200}", available=near)
        value = self.read_raw(info)
        if info.stored is not None:
            value = decode(value, info, None if info.stored.scale is None else self.read_raw(info.stored.scale))
        return value if self.lora is None else self.lora.apply(name, value)

    def read_raw(self, info: ShardTensor) -> torch.Tensor:
        """Return a tensor as the file has it: in the dtype that it is stored in, without its scale and without LoRAs.

        Args:
            info: The place of the tensor.

        Raises:
            CheckpointError: The tensor is unreadable, or its file has changed since it was opened.
            ResourceError: There is not enough memory for the tensor.
        """
        with self._opened(info.shard) as fd:
            return read_tensor_from(fd, info.raw, info.path)

    @contextlib.contextmanager
    def _opened(self, shard: str) -> Iterator[int]:
        """Yield a descriptor of a shard that is the file whose header was checked, both before and after the block.

        Args:
            shard: The name of the file in the folder.

        Raises:
            CheckpointError: The file has gone, cannot be read, or has changed.
        """
        path = self.root / shard
        try:
            fd = self.folder.open(shard)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} has gone", fix="leave the model as it is while it is read") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {reason_of(error)}",
                fix=fix_of(error, "leave the model as it is while it is read"),
            ) from error
        try:
            self._require_same(fd, shard)
            yield fd
            self._require_same(fd, shard)
        finally:
            os.close(fd)

    def _require_same(self, fd: int, shard: str) -> None:
        """Check that an open shard is still the file whose header was checked.

        Raises:
            CheckpointError: It was written to or replaced.
        """
        now, known = FileIdentity.of(fd), self.files[shard]
        if now == known:
            return
        if now.may_hold_the_same(known) and self._holds_the_same(fd, shard):
            self.files[shard] = now  # a new mode, owner or name of the file: compared once, not at every read
            return
        raise CheckpointError(
            f"{self.root / shard} has changed since it was opened: it was written to or replaced",
            fix="leave the model as it is while it is read, and start again",
        )

    def _holds_the_same(self, fd: int, shard: str) -> bool:
        """Return whether the header and the samples of a shard are those of before; False where none were taken."""
        if shard not in self.samples:
            return False
        try:
            header = read_header_from(fd, self.root / shard)
        except CheckpointError:
            return False
        digest = hashlib.sha256()
        for sample in _samples(
            fd, [part for info in self.tensors.values() for part in info.parts if part.shard == shard]
        ):
            digest.update(sample)
        return header.digest == self.headers[shard] and digest.digest() == self.samples[shard]

    def check_unchanged(self) -> None:
        """Check that every shard is still the file that was opened.

        It is for a library that reads the folder by path: call it before and after.

        Raises:
            CheckpointError: A file has gone or has changed; the error names it.
        """
        for shard in self.files:
            with self._opened(shard):
                pass

    def fingerprint(self) -> str:
        """Return a text that tells one model from another.

        It is ``v2-`` and a SHA-256 of the config, of every header, and of up to 4096 bytes in the middle of every
        tensor. It costs one short read a tensor. It is the same wherever the same files lie, because it holds no times
        and no paths. It is no hash of the weights: two models that differ only outside these bytes have one
        fingerprint.

        Raises:
            CheckpointError: A file has gone, cannot be read, or has changed since it was opened.
        """
        digest = hashlib.sha256(json.dumps([self.config, sorted(self.headers.items())], sort_keys=True).encode())
        by_shard: dict[str, list[ShardTensor]] = {shard: [] for shard in sorted(self.headers)}
        for info in self.tensors.values():
            for part in info.parts:
                by_shard[part.shard].append(part)
        for shard, infos in by_shard.items():
            own = hashlib.sha256()
            with self._opened(shard) as fd:
                for sample in _samples(fd, infos):
                    digest.update(sample)
                    own.update(sample)
            self.samples[shard] = own.digest()
        if self.lora is not None:
            digest.update(self.lora.identity())
        return FINGERPRINT + digest.hexdigest()

    def check_finite(self, name: str, tensor: torch.Tensor) -> None:
        """Check that a tensor holds neither NaN nor infinities.

        Args:
            name: The name of the tensor, for the error.
            tensor: The tensor, of any shape and dtype.

        Raises:
            CheckpointError: It holds some; the error gives their count and the first index.
        """
        count, first = count_nonfinite(tensor)
        if count:
            raise CheckpointError(
                f"{self.place}: tensor {name!r:.200} holds {count} NaN or infinite values of {tensor.numel()}, "
                f"the first at index {list(first)}",
                fix="download the weights again, or use --allow-nonfinite to go on and record them in the manifest",
            )

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], unused: Collection[str] = ()) -> None:
        """Check that names and shapes of the tensors are exactly the expected ones.

        Args:
            expected: The shape of every tensor by name.
            unused: Names of tensors that may be there besides.

        Raises:
            CheckpointError: Tensors are missing, unexpected or of another shape; the error lists up to five.
        """
        problems: list[str] = []
        count = 0
        for name, shape in expected.items():
            if name not in self.tensors:
                count += 1
                if len(problems) < 5:
                    problems.append(f"missing {name!r} {list(shape)}")
        for name, info in self.tensors.items():
            if name in unused or (name in expected and info.shape == tuple(expected[name])):
                continue
            count += 1
            if len(problems) < 5 and name in expected:
                problems.append(f"{name!r} is {list(info.shape)}, {self.class_name} needs {list(expected[name])}")
            elif len(problems) < 5:
                problems.append(f"unexpected {name!r:.200} {list(info.shape)}")
        if count:
            more = f"; and {count - 5} more" if count > 5 else ""
            raise CheckpointError(
                f"{self.place} does not fit its config.json: {'; '.join(problems)}{more}",
                fix="use the config.json and the weights of one and the same model"
                if self.source.is_diffusers
                else f"download {self.source.file or 'the model'} again, or give its config.json with --config FILE",
            )


def _samples(fd: int, infos: Collection[ShardTensor]) -> Iterator[bytes]:
    """Yield up to ``SAMPLE`` bytes in the middle of each tensor of one open file, in the order of the file."""
    for info in sorted(infos, key=lambda info: info.offset):
        count = min(SAMPLE, info.nbytes)
        try:
            yield os.pread(fd, count, info.offset + (info.nbytes - count) // 2)
        except OSError as error:
            raise CheckpointError(
                f"{info.path} cannot be read: {reason_of(error)}", fix=fix_of(error, "download it again")
            ) from error


def fingerprint_hint(*fingerprints: str) -> str | None:
    """Return why fingerprints of one model may differ, or None if all were made in the same way.

    Fingerprints of older releases hashed modification times.

    Args:
        *fingerprints: The fingerprints to compare.
    """
    if len({value.startswith(FINGERPRINT) for value in fingerprints}) == 1:
        return None
    return "one of them was recorded by an older release, whose fingerprint held the times of the files"


def count_nonfinite(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Count the NaN and infinite values of a tensor in bounded memory.

    Args:
        tensor: The tensor, of any shape and dtype.

    Returns:
        Their number, and the index of the first one (``()`` if there is none).
    """
    import torch

    if not tensor.dtype.is_floating_point or not tensor.numel():
        return 0, ()
    count, first, flat, step = 0, -1, tensor.reshape(-1), 1 << 22
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        part = part.float() if part.element_size() == 1 else part
        # The extremes show NaN and infinities, and need one pass without a temporary tensor.
        finite = all(math.isfinite(extreme) for extreme in torch.aminmax(part))
        if not finite and (found := int((bad := ~torch.isfinite(part)).sum())):
            first = start + int(bad.nonzero()[0]) if first < 0 else first
            count += found
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)]
    return count, tuple(first // s % n for s, n in zip(strides, tensor.shape)) if count else ()
