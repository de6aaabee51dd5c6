"""Hostile model folders: every attack is refused for the right reason, and nothing outside the folder is opened."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.errors import CheckpointError, DvdquantError
from tests.support.checkpoint_folders import (
    CONFIG,
    INDEX,
    SHARD1,
    SHARD2,
    SINGLE,
    entry,
    raw_safetensors,
    save_checkpoint,
    save_pipeline,
    tensors,
    write_index,
)
from tests.support.costs import Costs
from tests.support.folders import memory_folder
from tests.support.opened_files import watch_opened

ROOT = Path(__file__).parents[2]
TINY_WAN = ROOT / "examples" / "tiny-wan"


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch pickled",)


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda m: (m / "config.json").write_text(json.dumps({**CONFIG, **changes}))  # type: ignore[func-returns-value]


def _text(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda m: (m / name).write_bytes(text.encode() if isinstance(text, str) else text)  # type: ignore[func-returns-value]


def _shard_called(name: Any) -> Callable[[Path], None]:
    def attack(model: Path) -> None:
        (model / SINGLE).unlink()
        write_index(model, dict.fromkeys(tensors(6), name))

    return attack


def _only(name: str) -> Callable[[Path], None]:
    def attack(model: Path) -> None:
        (model / SINGLE).unlink()
        (model / name).write_bytes(pickle.dumps(Bomb()))

    return attack


def _link(name: str, target: str) -> Callable[[Path], None]:
    def attack(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target)

    return attack


def _linked_pair(model: Path) -> None:
    (model / "a").symlink_to("..")
    (model / SINGLE).unlink()
    (model / SINGLE).symlink_to(f"a/secret/{SINGLE}")


def _pipe(name: str) -> Callable[[Path], None]:
    def attack(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return attack


def _folder(model: Path) -> None:
    (model / SINGLE).unlink()
    (model / SINGLE).mkdir()


SHARDED = {f"blocks.{i}.weight": (SHARD1, SHARD2)[i % 2] for i in range(6)}


def _sharded(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def attack(model: Path) -> None:
        (model / SINGLE).unlink()
        save_checkpoint(model, 2)
        change(model)

    return attack


def _index(**changes: Any) -> Callable[[Path], None]:
    return _sharded(lambda m: write_index(m, {**SHARDED, **{k.replace("_", "."): v for k, v in changes.items()}}))


def _without(name: str) -> Callable[[Path], None]:
    return _sharded(lambda m: write_index(m, {k: v for k, v in SHARDED.items() if k != name}))


ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "auto_map": (_config(auto_map={"AutoModel": "evil.Evil"}), "code of its own"),
    "auto_map within": (_config(sub={"x": [{"auto_map": {}}]}), "code of its own"),
    "a .py value": (_config(processor="evil.py"), "names a Python file"),
    "a .py file": (_text("evil.py", "raise SystemExit"), "holds code"),
    "a .so file": (_text("evil.so", "x"), "holds code"),
    "no class": (_text("config.json", '{"num_layers": 2}'), "_class_name None"),
    "class is a path": (_config(_class_name="os.system"), "_class_name"),
    "class is a list": (_config(_class_name=["evil", "Evil"]), "_class_name"),
    "config is a list": (_text("config.json", "[]"), "not a JSON object"),
    "config is empty": (_text("config.json", ""), "cannot be used"),
    "config is bytes": (_text("config.json", b"\xff\xfe\x00"), "cannot be used"),
    "config with NaN": (_text("config.json", '{"_class_name":"A","x":NaN}'), "finite"),
    "config with 1e999": (_text("config.json", '{"_class_name":"A","x":1e999}'), "finite"),
    "config with duplicates": (_text("config.json", '{"_class_name":"A","_class_name":"B"}'), "appears twice"),
    "config of depth 65": (_text("config.json", '{"x":' + "[" * 64 + "]" * 64 + "}"), "deeper than 64"),
    "config of depth 100000": (_text("config.json", '{"x":' + "[" * 99999 + "]" * 99999 + "}"), "deeper than 64"),
    "config above 64 MB": (_text("config.json", "{" + " " * (64 << 20) + "}"), "more than the 67108864 allowed"),
    "config is a pipe": (_pipe("config.json"), "not a regular file"),
    "config is a link out": (_link("config.json", "../secret/config.json"), "outside the folder"),
    "config is a device": (_link("config.json", "/dev/zero"), "outside the folder"),
    "weights are a link out": (_link(SINGLE, f"../secret/{SINGLE}"), "outside the folder"),
    "weights are an absolute link": (_link(SINGLE, "/etc/passwd"), "outside the folder"),
    "weights by two links": (_linked_pair, "outside the folder"),
    "weights link to themselves": (_link(SINGLE, SINGLE), "lacks the shard|symbolic links"),
    "weights are a dangling link": (_link(SINGLE, "nothing"), "lacks the shard"),
    "weights are a pipe": (_pipe(SINGLE), "not a regular file"),
    "weights are a folder": (_folder, "not a regular file"),
    "weights are a pickle": (_text(SINGLE, pickle.dumps(Bomb())), "not a usable safetensors file"),
    "no weights": (lambda m: (m / SINGLE).unlink(), "has no weights"),
    "no tensors": (_text(SINGLE, raw_safetensors(b"{}")), "holds no tensors"),
    "only .bin": (_only("diffusion_pytorch_model.bin"), "run code when loaded"),
    "only .pt": (_only("model.pt"), "run code when loaded"),
    "only .ckpt": (_only("model.ckpt"), "run code when loaded"),
    "only .pth": (_only("model.pth"), "run code when loaded"),
    "only a variant": (lambda m: (m / SINGLE).rename(m / "x.fp16.safetensors") and None, "x.fp16.safetensors"),
    "shard in the parent": (_shard_called(f"../secret/{SINGLE}"), "is said to lie in"),
    "shard absolute": (_shard_called("/etc/passwd"), "is said to lie in"),
    "shard in a folder": (_shard_called(f"a/{SINGLE}"), "is said to lie in"),
    "shard with backslash": (_shard_called("..\\secret\\x.safetensors"), "is said to lie in"),
    "shard with NUL": (_shard_called("x\0.safetensors"), "is said to lie in"),
    "shard with newline": (_shard_called("x.safetensors\n"), "is said to lie in"),
    "shard is dots": (_shard_called(".."), "is said to lie in"),
    "shard is a .bin": (_shard_called("pytorch_model.bin"), "is said to lie in"),
    "shard is a number": (_shard_called(7), "is said to lie in"),
    "shard is a list": (_shard_called(["x.safetensors"]), "is said to lie in"),
    "shard absent": (_shard_called("absent.safetensors"), "lacks the shard"),
    "shard name of 5000": (_shard_called("x" * 5000 + ".safetensors"), "is said to lie in"),
    "index is a list": (_text(INDEX, "[]"), "not a JSON object"),
    "index without map": (_text(INDEX, "{}"), "no weight_map"),
    "index with an empty map": (_text(INDEX, '{"weight_map":{}}'), "no weight_map"),
    "index map is a list": (_text(INDEX, '{"weight_map":["x"]}'), "no weight_map"),
    "index link out": (_link(INDEX, "../secret/config.json"), "outside the folder"),
    "index is deep": (_text(INDEX, '{"weight_map":' + "{" * 0 + "[" * 70 + "]" * 70 + "}"), "deeper than 64"),
    "index names a tensor too many": (_index(blocks_9_weight=SHARD1), "lacks tensor 'blocks.9.weight'"),
    "index in the wrong shard": (_index(blocks_0_weight=SHARD2), "lacks|should lie in"),
    "index lacks a tensor": (_without("blocks.1.weight"), "should not exist"),
    "shard the index does not name": (
        _sharded(lambda m: shutil.copy(m / SHARD1, m / "diffusion_pytorch_model-00003-of-00003.safetensors") and None),
        "does not name",
    ),
    "tensor in two shards": (_sharded(lambda m: shutil.copy(m / SHARD1, m / SHARD2) and None), "lacks|should lie in"),
    "shard removed": (_sharded(lambda m: (m / SHARD2).unlink()), "lacks the shard"),
    "shard is a link out": (_sharded(_link(SHARD2, f"../secret/{SINGLE}")), "outside the folder"),
    "header with overlap": (_text(SINGLE, raw_safetensors({"x": entry(), "y": entry()}, bytes(24))), "overlaps"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every attack starts from a good folder, beside a folder with a secret, and is refused for the right reason,
    without anything being run, written, or opened outside the folder."""
    attack, words = ATTACKS[name]
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    save_checkpoint(model)
    save_checkpoint(tmp_path / "secret")
    opened: list[str] = []
    watch_opened(opened)
    open_checkpoint(model)
    watch_opened(None)
    assert opened == [str(model), "./config.json", str(model), f"./{SINGLE}"]  # the watch sees what is opened
    attack(model)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    opened.clear()
    watch_opened(opened)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(model)
    watch_opened(None)
    assert not [path for path in opened if "secret" in path or path.startswith(("/etc", "/dev"))]
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    str(caught.value).encode()
    assert "\0" not in str(caught.value)


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_folder() as folder:
        yield Path(folder)


PIPELINES: dict[str, tuple[dict[str, Any], str]] = {
    "custom code": ({"transformer": ["my_module", "MyModel"]}, "my_module"),
    "custom class": ({"transformer": "MyModel"}, "transformer is 'MyModel'"),
    "three parts": ({"transformer": ["diffusers", "A", "B"]}, "transformer is"),
    "none": ({"transformer": None}, "without a transformer"),
    "a path": ({"transformer/../../x": ["diffusers", "A"]}, "without a transformer"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_that_are_refused(tmp_path: Path, name: str) -> None:
    entries, words = PIPELINES[name]
    save_pipeline(tmp_path / "p", **entries)
    with pytest.raises(DvdquantError, match=words):
        open_checkpoint(tmp_path / "p")


def test_components_and_subfolders_cannot_leave_the_folder(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "p", "transformer")
    save_checkpoint(tmp_path / "secret")
    for options in ({"component": "../secret"}, {"subfolder": "../secret"}, {"subfolder": "/etc"}, {"component": ".."}):
        with pytest.raises(CheckpointError, match="no plain folder name"):
            open_checkpoint(tmp_path / "p", **options)  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "p" / "transformer")
    (tmp_path / "p" / "transformer").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(tmp_path / "p")
    (tmp_path / "p" / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(tmp_path / "p")


def test_single_files_are_not_folders(tmp_path: Path) -> None:
    (tmp_path / "wan.ckpt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        open_checkpoint(tmp_path / "wan.ckpt")
    (tmp_path / "wan.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a usable safetensors file"):
        open_checkpoint(tmp_path / "wan.safetensors")


@pytest.mark.parametrize("count", [1500, pytest.param(100_000, marks=pytest.mark.stress)])
def test_mutated_configs_and_indexes(memory: Path, count: int) -> None:
    """Whatever a byte is changed to: it opens or is refused, and never reads outside."""
    rng, model = random.Random(23), memory / "m"
    save_checkpoint(model, 2)
    texts = {name: (model / name).read_bytes() for name in ("config.json", INDEX)}
    tokens = [b'"', b"{", b"[", b"../", b"\\u0000", b"\xff", b"null", b"1e999", b'"auto_map":1,', b"9" * 40]
    opened: list[str] = []
    with Costs("config.json and the index of shards, bytes") as costs:
        for _ in range(count):
            name = rng.choice(list(texts))
            raw = bytearray(texts[name])
            for _ in range(rng.randint(1, 3)):
                place = rng.randrange(len(raw))
                raw[place : place + rng.randint(0, 6)] = rng.choice([*tokens, bytes([rng.randrange(256)])])
            (model / name).write_bytes(raw)
            opened.clear()
            watch_opened(opened)
            try:
                with suppress(CheckpointError), costs.case():
                    open_checkpoint(model)
            finally:
                watch_opened(None)
            assert all(path.startswith((str(model), "./")) for path in opened), opened
            (model / name).write_bytes(texts[name])
    assert costs.refused > count // 2
