"""Folders from elsewhere: links, swaps in between, changes while reading, and sizes that cost more than they should."""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.prompt_table import PromptTable
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.checkpoint.untrusted import UntrustedFolder
from dvdquant.deploy.pipelines.parts import open_pipeline_folder
from dvdquant.deploy.pipelines.schedulers import open_table_scheduler
from dvdquant.errors import CheckpointError, DvdquantError
from tests.support.checkpoint_folders import (
    INDEX,
    SHARD1,
    SINGLE,
    entry,
    raw_safetensors,
    save_checkpoint,
    save_pipeline,
    tensors,
    write_index,
)
from tests.support.children import in_child
from tests.support.costs import Costs
from tests.support.folders import memory_folder

ROOT = Path(__file__).parents[2]
TINY_WAN = ROOT / "examples" / "tiny-wan"


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_folder() as folder:
        yield Path(folder)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_WAN, tmp_path / "tiny"))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline folder as far as it is read before anything is loaded."""
    root = tmp_path / "pipeline"
    parts = {
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    save_pipeline(root, "transformer", **parts)
    for part in ("text_encoder", "vae"):
        save_checkpoint(root / part)
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    shutil.copytree(TINY_WAN / "scheduler", root / "scheduler")
    open_pipeline_folder(str(root), "wan")
    return root


# ----------------------------------------------------------------------------------------------------------------- links

READERS: dict[str, Callable[[Path], Any]] = {
    "prompts.json": PromptTable.open,
    "prompts.safetensors": PromptTable.open,
    "scheduler": open_table_scheduler,
    "scheduler/scheduler_config.json": open_table_scheduler,
    "transformer": open_checkpoint,
    "transformer/config.json": open_checkpoint,
    f"transformer/{SINGLE}": open_checkpoint,
}


@pytest.mark.parametrize("name", READERS)
def test_links_that_leave_the_folder(tiny: Path, tmp_path: Path, name: str) -> None:
    """Every file of a model and every folder in it, whichever reader it is for; a link inside is followed."""
    READERS[name](tiny)
    inside = tiny / "moved"
    shutil.move(tiny / name, inside)
    (tiny / name).symlink_to(os.path.relpath(inside, (tiny / name).parent))
    READERS[name](tiny)
    outside = tmp_path / "secret"
    shutil.move(inside, outside)
    (tiny / name).unlink()
    (tiny / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="reads outside the folder"):
        READERS[name](tiny)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "text_encoder",
        f"text_encoder/{SINGLE}",
        "text_encoder/config.json",
        f"vae/{SINGLE}",
    ],
)
def test_links_that_leave_a_pipeline(pipeline: Path, tmp_path: Path, name: str) -> None:
    """Also those files that diffusers and transformers read by path themselves."""
    shutil.move(pipeline / name, tmp_path / "secret")
    (pipeline / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="reads outside the folder"):
        open_pipeline_folder(str(pipeline), "wan")


@pytest.mark.parametrize("part", ["tokenizer", "scheduler", "vae"])
def test_pipes_and_hidden_links_in_parts_that_libraries_read(pipeline: Path, tmp_path: Path, part: str) -> None:
    os.mkfifo(pipeline / part / "added_tokens.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_pipeline_folder(str(pipeline), "wan")
    (pipeline / part / "added_tokens.json").unlink()
    deep = pipeline / "elsewhere" / "deep"
    deep.mkdir(parents=True)
    (pipeline / part / "more").symlink_to("../elsewhere")
    open_pipeline_folder(str(pipeline), "wan")
    (deep / "loop").symlink_to("..")
    open_pipeline_folder(str(pipeline), "wan")
    (deep / "x").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="reads outside the folder"):
        open_pipeline_folder(str(pipeline), "wan")


@pytest.mark.parametrize("name", ["file", "folder/file"])
@pytest.mark.parametrize("swapped", [0, 1])
def test_a_link_put_there_after_the_check_is_not_followed(tmp_path: Path, name: str, swapped: int) -> None:
    """The last moment before the open: real_path has been found good, then the file or its folder becomes a link."""
    model, secret = tmp_path / "model", tmp_path / "secret"
    for folder in (model, secret):
        (folder / "folder").mkdir(parents=True)
        for path in (folder / "file", folder / "folder" / "file"):
            path.write_text(folder.name)
    folder = UntrustedFolder.at(model)
    assert folder.read(name, 100) == b"model"
    target = model / (name if swapped or "/" not in name else "folder")
    real = UntrustedFolder.locate

    def located(self: UntrustedFolder, wanted: str) -> Path:
        found = real(self, wanted)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        target.symlink_to(secret / target.relative_to(model))
        return found

    with mock.patch.object(UntrustedFolder, "locate", located), pytest.raises(OSError):
        folder.read(name, 100)
    assert not [fd for fd in os.listdir("/proc/self/fd") if "secret" in _target(fd)]


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


# ------------------------------------------------------------------------------------- files that change while they are read


def _replace(path: Path) -> None:
    content = {name: -value for name, value in tensors(6).items()}
    save_file(content, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\0" * 8)


def _link(path: Path) -> None:
    path.rename(path.parents[1] / "moved")
    path.symlink_to("../moved")


def _same_bytes(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "replaced": (_replace, "has changed"),
    "replaced by the same bytes": (_same_bytes, "has changed"),
    "overwritten": (_overwrite, "has changed"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 4), "has changed"),
    "grown": (lambda path: os.truncate(path, path.stat().st_size + 4), "has changed"),
    "a link out": (_link, "outside the folder"),
    "gone": (lambda path: path.unlink(), "has gone"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_shard_that_changes_after_it_was_checked(tmp_path: Path, name: str) -> None:
    change, said = CHANGES[name]
    save_checkpoint(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    checkpoint.read("blocks.0.weight")
    time.sleep(0.02)  # the clock of file times ticks every few milliseconds
    change(tmp_path / "m" / SINGLE)
    uses: list[Callable[[], Any]] = [
        lambda: checkpoint.read("blocks.0.weight"),
        checkpoint.fingerprint,
        checkpoint.check_unchanged,
    ]
    for use in uses:
        with pytest.raises(CheckpointError, match=said) as caught:
            use()
        assert SINGLE in caught.value.what


def _hidden(at: int) -> Callable[[Path], None]:
    """A write that sets the time of the file back, so that its change time alone tells of it."""

    def write(path: Path) -> None:
        times = path.stat()
        with path.open("r+b") as file:
            file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
            file.write(b"\x55" * 8)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    return write


def _link_and_unlink(path: Path) -> None:
    os.link(path, path.with_suffix(".backup"))
    path.with_suffix(".backup").unlink()


HARMLESS: dict[str, Callable[[Path], Any]] = {
    "another mode": lambda path: path.chmod(0o600),
    "the same mode again": lambda path: path.chmod(path.stat().st_mode & 0o777),
    "the same owner again": lambda path: os.chown(path, os.getuid(), os.getgid()),
    "a second name": lambda path: os.link(path, path.parents[1] / "second"),
    "a second name for a while": _link_and_unlink,
    "moved away and back": lambda path: path.rename(path.with_suffix(".x")).rename(path),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_shard_of_the_same_bytes_goes_on_being_read(tmp_path: Path, name: str) -> None:
    saved = save_checkpoint(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    first = checkpoint.fingerprint()
    time.sleep(0.02)
    HARMLESS[name](tmp_path / "m" / SINGLE)
    assert torch.equal(checkpoint.read("blocks.0.weight"), saved["blocks.0.weight"])
    with mock.patch("os.pread", side_effect=AssertionError("compared again")):
        checkpoint.check_unchanged()
    assert checkpoint.fingerprint() == first


@pytest.mark.parametrize("at", [20, -8])
def test_a_hidden_write_is_found_in_what_was_sampled(tmp_path: Path, at: int) -> None:
    """In the header, and in the weights: the tensors here are smaller than their sample."""
    save_checkpoint(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    checkpoint.fingerprint()
    time.sleep(0.02)
    _hidden(at)(tmp_path / "m" / SINGLE)
    for use in (lambda: checkpoint.read("blocks.0.weight"), checkpoint.fingerprint, checkpoint.check_unchanged):
        with pytest.raises(CheckpointError, match="has changed"):
            use()


def test_without_a_sample_a_hidden_write_is_told_by_its_time(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    time.sleep(0.02)
    _hidden(-8)(tmp_path / "m" / SINGLE)
    with pytest.raises(CheckpointError, match="has changed"):
        checkpoint.read("blocks.0.weight")


def test_a_shard_that_changes_during_one_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    real = os.preadv

    def slow(fd: int, buffers: Any, offset: int) -> int:
        time.sleep(0.02)
        _overwrite(tmp_path / "m" / SINGLE)
        return real(fd, buffers, offset)

    with mock.patch("os.preadv", slow), pytest.raises(CheckpointError, match="has changed"):
        checkpoint.read("blocks.0.weight")


# ------------------------------------------------------------------------------------------- small files and large costs

MEMORY = 1 << 30
SECONDS = 5.0


def _big_index(folder: Path) -> None:
    """199 000 tensors in 5000 shards, of which the first ones hold what they should."""
    (folder / SINGLE).unlink()
    names = {f"blocks.{i}.attention.to_out.weight": f"s{i % 5000:05d}-of-05000.safetensors" for i in range(199_000)}
    write_index(folder, names)
    for shard in sorted(set(names.values()))[:200]:
        mine = [name for name, where in names.items() if where == shard] if shard < "s00003" else []
        header = {name: entry("U8", (1,), (i, i + 1)) for i, name in enumerate(mine)}
        (folder / shard).write_bytes(raw_safetensors(header, bytes(len(mine))))


def _complete_index(folder: Path) -> None:
    """199 000 entries that are all there, so that nothing is left out."""
    (folder / SINGLE).unlink()
    names: dict[str, str] = {}
    for shard in range(100):
        mine = [f"blocks.{shard}.layer.{i}.w" for i in range(1990)]
        names.update(dict.fromkeys(mine, f"s{shard}.safetensors"))
        header = {name: entry("U8", (1,), (i, i + 1)) for i, name in enumerate(mine)}
        (folder / f"s{shard}.safetensors").write_bytes(raw_safetensors(header, bytes(len(mine))))
    write_index(folder, names)


def _shard_each(folder: Path) -> None:
    (folder / SINGLE).unlink()
    write_index(folder, {f"t{i}": f"s{i}.safetensors" for i in range(500_000)})


def _half_a_million(folder: Path) -> None:
    """An index of 60 MB."""
    (folder / SINGLE).unlink()
    name = "transformer_blocks.{}.attention.to_out.0.a_rather_long_name_of_a_weight.weight"
    write_index(folder, {name.format(i): f"s{i % 5000:05d}-of-05000.safetensors" for i in range(500_000)})


def _names_of_a_megabyte(folder: Path) -> None:
    (folder / SINGLE).write_bytes(
        raw_safetensors({f"{i}" + "x" * (1 << 20): entry("U8", (1,), (i, i + 1)) for i in range(30)}, bytes(30))
    )


def _many_keys(folder: Path) -> None:
    text = '{"weight_map":{"\U0001f600":"' + ",".join(f'"a{i}":1' for i in range(4_000_000))
    (folder / INDEX).write_text(text[: 60 << 20])


def _flat(folder: Path) -> None:
    """As many values as are allowed, in text that Python holds in four bytes a character."""
    body = ",".join(f'"k{i}":[]' for i in range(480_000))
    (folder / INDEX).write_text('{"\U0001f600":1,' + body + "}" + " " * (50 << 20))


def _many_files(folder: Path) -> None:
    for i in range(100_100):
        os.mknod(folder / f"f{i}")


def _error_of(call: Callable[[], Any]) -> DvdquantError | None:
    """The error of ours that a call ends with, or None."""
    try:
        call()
    except DvdquantError as error:
        return error
    return None


COSTLY: dict[str, Callable[[Path], Any]] = {
    "big index": _big_index,
    "complete index": _complete_index,
    "half a million": _half_a_million,
    "a shard for each": _shard_each,
    "names of a megabyte": _names_of_a_megabyte,
    "many keys": _many_keys,
    "flat": _flat,
    "many files": _many_files,
}


LIGHT = ("big index", "names of a megabyte", "many keys", "flat")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.stress] if n not in LIGHT else []) for n in COSTLY],
)
def test_costs_are_bounded(memory: Path, name: str) -> None:
    """Under 5 s and 1 GB whatever the files say, and an error of readable length."""
    save_checkpoint(memory / "m")
    COSTLY[name](memory / "m")

    def work() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        opened: list[Checkpoint] = []
        errors = [_error_of(lambda: opened.append(open_checkpoint(memory / "m")))]
        for checkpoint in opened:
            errors += [_error_of(functools.partial(checkpoint.read, "x" * (1 << 20)))]
            errors += [_error_of(functools.partial(checkpoint.check_shapes, {"y" * 1000: (1,)}))]
        assert all(len(str(error)) < 5000 for error in errors)
        seconds = time.process_time() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(f"{name}: {seconds:.2f} s, {grown / 1e6:.0f} MB", file=sys.stderr)
        assert seconds < SECONDS
        assert grown < MEMORY

    assert in_child(work) == 0


# ------------------------------------------------------------------------------------------------------ names and rights


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """In the folder they are shown escaped; as the model's own name they are refused at once, not when a manifest is
    written after hours."""
    save_checkpoint(tmp_path / "m")
    (tmp_path / "m" / os.fsdecode(b"\xff\xfe\x1b[2J.txt")).write_text("x")
    open_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config") as caught:
        open_checkpoint(tmp_path / "m")
    str(caught.value).encode()
    assert "\x1b" not in str(caught.value)
    odd = tmp_path / os.fsdecode(b"model-\xff")
    save_checkpoint(odd)
    with pytest.raises(CheckpointError, match="not UTF-8") as caught:
        open_checkpoint(odd)
    str(caught.value).encode()


@pytest.mark.parametrize("model", ["x" * 5000, "/x" * 2500, "x/" * 2500, "~" + "u" * 5000, "x" * 300 + "/y"])
def test_very_long_paths(model: str) -> None:
    """One error of readable length from every reader."""
    assert not PromptTable.is_at(model)
    for reader in (open_checkpoint, Checkpoint.components, PromptTable.open, lambda m: open_pipeline_folder(m, "wan")):
        with pytest.raises(DvdquantError) as caught:
            reader(model)  # type: ignore[operator]
        assert caught.value.what


def test_a_model_that_is_no_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for model in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(CheckpointError, match="a device, a pipe or a socket"):
            open_checkpoint(model)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("closed", ["", "config.json", SINGLE, "..", "index"])
def test_folders_and_files_without_permission(closed: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "above"
        save_checkpoint(place / "m", 2 if closed == "index" else 1)
        shutil.copy(TINY_WAN / "prompts.json", place / "m")
        os.chmod(folder, 0o755)
        target = place / "m" / (INDEX if closed == "index" else closed)
        target.resolve().chmod(0o000)

        def work() -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            PromptTable.is_at(place / "m")
            for reader in (open_checkpoint, Checkpoint.components, lambda m: open_pipeline_folder(str(m), "wan")):
                error = _error_of(functools.partial(reader, place / "m"))
                if error is None:
                    assert reader == Checkpoint.components
                    continue
                assert str(place) in str(error)
                assert error.fix
                assert "Permission" not in str(error) or "chmod" in error.fix

        assert in_child(work) == 0
        target.resolve().chmod(0o755)


# -------------------------------------------------------------------------------------------------------------- mutations

TOKENS = [b'"', b"{", b"}", b"[", b"]", b"../", b"\\u0000", b"\xff", b"null", b"1e999", b"-1", b"0", b"9" * 40]
TOKENS += [b"1e308", b"true", b'"":', b"\\ud800", b"1" * 5000, "\u202e".encode(), b'"auto_map":1,', b"[" * 200]


def _mutated(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        place, what = rng.randrange(max(1, len(data))), rng.random()
        if what < 0.3:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif what < 0.7:
            data[place : place + rng.randint(0, 6)] = rng.choice(TOKENS)
        elif what < 0.85:
            del data[place : place + rng.randint(1, 30)]
        else:
            other = rng.randrange(max(1, len(data)))
            data[place:place] = data[other : other + rng.randint(1, 60)]
    return bytes(data)


def _json_mutated(raw: bytes, rng: random.Random) -> bytes:
    """One value of valid JSON becomes another: what passes the parser reaches the checks behind it."""
    data = json.loads(raw)
    node: Any = data
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        values = [
            None,
            True,
            -1,
            0,
            1,
            2**31,
            2**63,
            10**400,
            1e300,
            "",
            "x" * 3000,
            "\u202e\x1b[2J",
            [],
            {},
            [[]],
            0.5,
        ]
        node[key] = rng.choice(values)
        return json.dumps(data).encode()


TARGETS: dict[str, tuple[list[str], Callable[[Path], Any]]] = {
    "pipeline": (
        ["model_index.json", "scheduler/scheduler_config.json"],
        lambda p: open_pipeline_folder(str(p), "wan"),
    ),
    "components": (["model_index.json"], lambda p: (Checkpoint.components(p), open_checkpoint(p))),
    "table": (["prompts.json"], lambda p: _use(PromptTable.open(p))),
    "words": (["prompts.safetensors"], lambda p: _use(PromptTable.open(p))),
    "scheduler": (["scheduler/scheduler_config.json"], open_table_scheduler),
    "index": ([f"transformer/{INDEX}"], open_checkpoint),
    "shard": ([f"transformer/{SHARD1}"], lambda p: [c.read(n) for c in [open_checkpoint(p)] for n in c.tensors]),
}


def _use(table: PromptTable) -> None:
    table.encode(table.example())
    table.encode(None)
    table.describe()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [150, pytest.param(6000, marks=pytest.mark.stress)])
def test_mutations(pipeline: Path, memory: Path, target: str, count: int) -> None:
    """Whatever is changed: it opens or is refused with an error of ours, in seconds, and its text can be printed."""
    model, rng = Path(shutil.copytree(pipeline, memory / "m")), random.Random(target)
    for name in ("prompts.json", "prompts.safetensors"):
        shutil.copy(TINY_WAN / name, model)
    shutil.rmtree(model / "transformer")
    save_checkpoint(model / "transformer", 2)
    names, reader = TARGETS[target]
    reader(model)
    with Costs(f"model folders ({target})") as costs:
        for i in range(count):
            path = model / rng.choice(names)
            whole = path.read_bytes()
            as_json = i % 2 and path.suffix == ".json"
            path.write_bytes(_json_mutated(whole, rng) if as_json else _mutated(whole, rng))
            started = time.monotonic()
            error = _error_of(lambda: reader(model))
            if error is not None:
                text = str(error)
                text.encode()
                assert len(text) < 8000, text[:500]
                assert not {"\x1b", "\u202e"} & set(text)
            costs.add(time.monotonic() - started, refused=error is not None)
            path.write_bytes(whole)
    assert costs.refused > count // 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_train_timesteps": 150_000_000}, "num_train_timesteps"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
        ({"num_train_timesteps": True}, "num_train_timesteps"),
        ({"num_train_timesteps": 1000.5}, "num_train_timesteps"),
        ({"use_dynamic_shifting": True}, "mu"),
        ({"shift": 0}, "shift"),
        ({"shift": -3.0}, "shift"),
        ({"shift": 1e300}, "shift"),
        ({"shift": "3"}, "shift"),
        ({"shift_terminal": 1.0}, "shift_terminal"),
        ({"time_shift_type": "cubic"}, "time_shift_type"),
    ],
)
def test_schedulers_that_give_no_noise_levels(tiny: Path, change: dict[str, Any], said: str) -> None:
    """They are refused when they are opened, not in the first step after minutes of loading."""
    path = tiny / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=said) as caught:
        open_table_scheduler(tiny)
    assert caught.value.fix


def test_prompt_tables_of_many_words_cost_little(tiny: Path) -> None:
    """65 000 words, a long prompt and a long unknown word: an answer in a second or two, of readable length."""
    words = ["<none>", *(f"w{i:05d}" for i in range(65_000))]
    data = json.loads((tiny / "prompts.json").read_text())
    (tiny / "prompts.json").write_text(json.dumps({**data, "words": words, "choices": {}}))
    save_file({"words": torch.zeros(len(words), 4)}, tiny / "prompts.safetensors")
    started = time.process_time()
    table = PromptTable.open(tiny)
    for prompt in ("w00001 " * 100_000, "z" * 1_000_000, "w0001"):
        with pytest.raises(DvdquantError) as caught:
            table.parse(prompt)
        assert len(str(caught.value)) < 8000
    assert time.process_time() - started < 5


def test_latents_are_bounded_by_their_product(tiny: Path) -> None:
    data = json.loads((tiny / "prompts.json").read_text())
    (tiny / "prompts.json").write_text(json.dumps({**data, "latent": [3, 60_000, 60_000, 60_000]}))
    with pytest.raises(CheckpointError, match="values, more than"):
        PromptTable.open(tiny)
