"""Checkpoints and exports made of real files, for the tests of the reader and of the output transaction."""

from __future__ import annotations

import errno
import gc
import hashlib
import itertools
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dvdquant.artifact.commit
from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.errors import OutputError
from dvdquant.recipe import get_recipe

if TYPE_CHECKING:  # the processes of the kill tests start faster without it
    import torch

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
SHARD1, SHARD2 = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
CONFIG = {"_class_name": "WanTransformer3DModel", "num_layers": 2, "patch_size": [1, 2, 2]}


def tensors(count: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """``count`` small tensors in several dtypes and shapes, an odd one and a scalar included."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(8, 16), (5,), (3, 7, 2), ()]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return {
        f"blocks.{i}.weight": torch.randn(shapes[i % 4], generator=generator).to(dtypes[i % 3]) for i in range(count)
    }


def save_checkpoint(folder: Path, shards: int = 1, config: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """A transformer folder as diffusers writes it; returns its tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    content = tensors(6)
    if shards == 1:
        save_file(content, folder / "diffusion_pytorch_model.safetensors")
        return content
    weight_map = {}
    for shard in range(shards):
        name = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: value for i, (key, value) in enumerate(content.items()) if i % shards == shard}
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    write_index(folder, weight_map)
    return content


def save_plain(folder: Path, shards: int = 1, config: Mapping[str, Any] | None = None) -> list[str]:
    """A transformer folder as :func:`save_checkpoint` lays it out, of one float a tensor and without torch; its names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    names = [f"blocks.{i}.weight" for i in range(6)]
    weight_map = {}
    for shard in range(shards):
        name = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        path = folder / (name if shards > 1 else "diffusion_pytorch_model.safetensors")
        part = names[shard::shards]
        header = {key: entry("F32", (1,), (4 * i, 4 * i + 4)) for i, key in enumerate(part)}
        path.write_bytes(raw_safetensors(header, bytes(range(4 * len(part)))))
        weight_map.update(dict.fromkeys(part, name))
    if shards > 1:
        write_index(folder, weight_map)
    return names


def save_pipeline(folder: Path, *components: str, **entries: Any) -> None:
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"], "transformer_9": [None, None]}
    index |= {name: ["diffusers", "WanTransformer3DModel"] for name in components} | entries
    for name in components:
        save_checkpoint(folder / name)
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))


def write_index(folder: Path, weight_map: Any) -> None:
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def raw_safetensors(header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


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


def memory_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory where there is one: thousands of small files in a row spend their time waiting for a disk."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; its exit status: 0, 1 after an exception, −9 when it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def at_operation(count: int, action: Callable[[], None], out: Path) -> None:
    """From now on, run ``action`` before the ``count``-th operation on names below or beside ``out``. For a child: an
    audit hook stays for good."""
    names = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    left = count

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event in names:
            path = os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else None
            # What is reached by the descriptor of its folder has a name alone.
            within = path is None or not os.path.isabs(path) or str(out.parent) in path
            counted = within and (event != "open" or (path is not None and bool(args[2] & writing)))
        else:
            counted = event == "ctypes.dlsym"
        if counted:
            left -= 1
            if left == -1:
                action()

    sys.addaudithook(hook)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_exchange(*names: object) -> None:
    """In place of ``dvdquant.artifact.commit.exchange``: a file system without renameat2."""
    raise OSError(errno.EINVAL, "Invalid argument")


def disturbed(work: str, out: str, count: int, action: str, way: str) -> None:
    """Run ``export_2``, ``resumable`` or ``abandoned``, with ``action`` before the ``count``-th operation on names."""
    if way == "roll-forward":
        dvdquant.artifact.commit.exchange = no_exchange
    at_operation(count, {"kill": kill_self, "no space": no_space}[action], Path(out))
    if work == "abandoned":
        export(Path(out), 2, finish=False)
    elif work == "resumable":
        export_resumable(Path(out))
    else:
        export(Path(out), 2)


KEY = {"fingerprint": "f" * 64, "recipe": {"name": "w4a4", "weight": {"group_size": 32}}, "sm": ["8.9"]}


def in_child_disturbed(*arguments: Any) -> int:
    """As :func:`in_child` of :func:`disturbed`."""
    return in_child(lambda: disturbed(*arguments))


def in_child_abandoned(*arguments: Any) -> int:
    """As :func:`in_child` of :func:`abandoned_work`."""
    return in_child(lambda: abandoned_work(*arguments))


def abandoned_work(out: str, steps: int, key: Any = KEY, killed: bool = True) -> None:
    """Be killed, or fail, after some finished steps of an export."""
    with ExportTransaction(Path(out), key=key, keep_for_resume=True) as transaction:
        six_steps(transaction, steps)
        if killed:
            kill_self()
        raise ValueError("broken")


def raced(out: str, first: int, rivals: int) -> list[int]:
    """Export in as many processes at the same moment; the status of each: 0, 5 where another one exports, 8 or 9."""
    children, gate = [], os.pipe()
    for rival in range(rivals):
        pid = os.fork()
        if pid == 0:
            code = 9
            try:
                os.close(gate[1])
                os.read(gate[0], 1)  # all start together, when the parent closes the gate
                export(Path(out), first + rival)
                code = 0
            except OutputError as error:
                code = 5 if "is being written by another export" in error.what else 8
            finally:
                os._exit(code)
        children.append(pid)
    os.close(gate[0])
    os.close(gate[1])
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def killed_at_random(out: str, seconds: float) -> int:
    """Export version after version, killed so many seconds after the first begins; returns how many began."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for version in itertools.count(1):
                os.write(writes, b".")
                export(Path(out), version)
        finally:
            os._exit(1)
    os.close(writes)
    with open(reads, "rb", buffering=0) as began:
        count = len(began.read(1))
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        while part := began.read(1000):
            count += len(part)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return count


def make_ready_to_fork() -> None:
    """Do what else every forked export would do anew: imports at the first export, and looking for garbage."""
    with memory_folder() as folder:
        for version in (1, 2):
            export(Path(folder) / "out", version)
    gc.collect()
    gc.freeze()
    gc.disable()


class CleanChildren:
    """Runs exports in forks of a small process: forking one that holds torch takes ten times as long."""

    def __init__(self) -> None:
        code = (
            "import json, sys; from tests.support import helpers_checkpoint as h\n"
            "h.make_ready_to_fork()\n"
            "for line in sys.stdin:\n"
            "    name, *arguments = json.loads(line)\n"
            "    print(json.dumps(getattr(h, name)(*arguments)), flush=True)"
        )
        command, pipe = [sys.executable, "-c", code], subprocess.PIPE
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            command, cwd=root, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, work: str, out: Path, count: int, action: str, way: str = "exchange") -> int:
        """Run :func:`disturbed`; the exit status, as of :func:`in_child`."""
        return int(self._call("in_child_disturbed", work, str(out), count, action, way))

    def abandon(self, out: Path, steps: int) -> None:
        """Leave an export of so many finished steps behind, whose process was killed."""
        assert self._call("in_child_abandoned", str(out), steps) == -signal.SIGKILL

    def race(self, out: Path, first: int, rivals: int) -> list[int]:
        """As :func:`raced`."""
        return list(self._call("raced", str(out), first, rivals))

    def kill_at_random(self, out: Path, seconds: float) -> int:
        """As :func:`killed_at_random`."""
        return int(self._call("killed_at_random", str(out), seconds))

    def _call(self, name: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([name, *arguments]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


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
