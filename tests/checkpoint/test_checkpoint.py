"""The checkpoint reader: the layouts it must open, the damage it must find, and what it tells the user."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.reader import Checkpoint, count_nonfinite, fingerprint_hint
from dvdquant.errors import CheckpointError
from dvdquant.system.safetensors_reader import DTYPES
from tests.support.checkpoint_folders import CONFIG, SHARD1, SHARD2, SINGLE, save_checkpoint, save_pipeline

ROOT = Path(__file__).parents[2]
TINY_WAN = ROOT / "examples" / "tiny-wan"


def _rewrite_config(**changes: Any) -> Callable[[Path], None]:
    return lambda m: (m / "config.json").write_text(json.dumps({**CONFIG, **changes}))  # type: ignore[func-returns-value]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_opens_single_and_sharded_folders(tmp_path: Path, shards: int) -> None:
    saved = save_checkpoint(tmp_path / "m", shards)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.class_name == "WanTransformer3DModel"
    assert checkpoint.config == CONFIG
    assert checkpoint.tensors.keys() == saved.keys()
    assert checkpoint.nbytes == sum(value.nbytes for value in saved.values())
    assert checkpoint.largest.nbytes == max(value.nbytes for value in saved.values())
    for name, value in saved.items():
        assert torch.equal(checkpoint.read(name), value)
        assert checkpoint.read(name).dtype == value.dtype
    checkpoint.check_shapes({name: tuple(value.shape) for name, value in saved.items()})


def test_opens_a_real_checkpoint() -> None:
    from diffusers import WanTransformer3DModel

    checkpoint = open_checkpoint(TINY_WAN)
    model = WanTransformer3DModel.from_pretrained(TINY_WAN / "transformer", torch_dtype=torch.bfloat16)
    state = model.state_dict()
    checkpoint.check_shapes({name: tuple(value.shape) for name, value in state.items()})
    for name, value in state.items():
        assert torch.equal(checkpoint.read(name).float(), value.float())
        checkpoint.check_finite(name, checkpoint.read(name))


def test_pipelines_with_one_and_two_transformers(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "one", "transformer")
    save_pipeline(tmp_path / "two", "transformer", "transformer_2")
    assert Checkpoint.components(tmp_path / "one") == ["transformer"]
    assert Checkpoint.components(tmp_path / "two") == ["transformer", "transformer_2"]
    second = open_checkpoint(tmp_path / "two", component="transformer_2")
    assert (second.root, second.component) == (tmp_path / "two" / "transformer_2", "transformer_2")
    with pytest.raises(CheckpointError, match="no component 'transformer_2'"):
        open_checkpoint(tmp_path / "one", component="transformer_2")
    with pytest.raises(CheckpointError, match="not a pipeline"):
        open_checkpoint(tmp_path / "one" / "transformer", component="transformer_2")
    assert Checkpoint.components(tmp_path / "one" / "transformer") == ["transformer"]
    (tmp_path / "two" / "model_index.json").unlink()
    assert Checkpoint.components(tmp_path / "two") == ["transformer", "transformer_2"]


def test_subfolder_and_links_inside_the_folder(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m" / "deep" / "er")
    assert open_checkpoint(tmp_path / "m", subfolder="deep/er").root == tmp_path / "m" / "deep" / "er"
    (tmp_path / "link").symlink_to("m")
    checkpoint = open_checkpoint(tmp_path / "link", subfolder="deep/er")
    assert checkpoint.root == tmp_path / "m" / "deep" / "er"  # ONNX external data needs real paths
    (tmp_path / "m" / "deep" / "er" / SINGLE).rename(tmp_path / "m" / "weights")
    (tmp_path / "m" / "deep" / "er" / SINGLE).symlink_to("../../weights")
    checkpoint = open_checkpoint(tmp_path / "m", subfolder="deep/er")
    assert checkpoint.largest.path == tmp_path / "m" / "weights"


def _hub_cache(cache: Path, repo: str = "models--org--wan") -> Path:
    """A hub cache as huggingface_hub lays it out: every file of the snapshot is a link to a blob."""
    plain, snapshot, blobs = cache / "plain", cache / repo / "snapshots" / ("a" * 40), cache / repo / "blobs"
    save_pipeline(plain, "transformer")
    blobs.mkdir(parents=True)
    (cache / repo / "refs").mkdir()
    (cache / repo / "refs" / "main").write_text("a" * 40)
    for number, path in enumerate(sorted(p for p in plain.rglob("*") if p.is_file())):
        blob, link = blobs / f"{number:064d}", snapshot / path.relative_to(plain)
        shutil.move(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_hub_cache_links_are_followed_to_their_blobs(tmp_path: Path) -> None:
    snapshot = _hub_cache(tmp_path)
    for folder in (snapshot, snapshot / "transformer"):
        checkpoint = open_checkpoint(folder)
        assert checkpoint.largest.path.parent == tmp_path / "models--org--wan" / "blobs"
        assert checkpoint.read("blocks.0.weight").shape == (8, 16)
        assert checkpoint.fingerprint()


def test_hub_cache_links_may_not_lead_to_other_repositories(tmp_path: Path) -> None:
    snapshot = _hub_cache(tmp_path)
    blob = (snapshot / "transformer" / SINGLE).resolve()
    other = tmp_path / "models--org--secret" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(blob, other / "x")
    (snapshot / "transformer" / SINGLE).unlink()
    (snapshot / "transformer" / SINGLE).symlink_to(other / "x")
    with pytest.raises(CheckpointError, match="reads outside the folder"):
        open_checkpoint(snapshot)


def test_a_hub_cache_whose_blobs_are_a_link(tmp_path: Path) -> None:
    snapshot, blobs = _hub_cache(tmp_path), tmp_path / "models--org--wan" / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="reads outside the folder"):
        open_checkpoint(snapshot / "transformer")


def test_the_way_out_of_a_hub_cache_whose_blobs_are_a_link(tmp_path: Path) -> None:
    """The repository is moved as a whole, under any name, and a link takes its place: as the error says."""
    snapshot, repository = _hub_cache(tmp_path), tmp_path / "models--org--wan"
    (repository / "blobs").rename(tmp_path / "elsewhere")
    (repository / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"move its folder models--ORG--NAME as a whole(?s:.*)--local-dir"):
        open_checkpoint(snapshot)
    (repository / "blobs").unlink()
    (tmp_path / "elsewhere").rename(repository / "blobs")
    (tmp_path / "disk").mkdir()
    repository.rename(tmp_path / "disk" / "wan")
    repository.symlink_to(tmp_path / "disk" / "wan")
    for folder in (snapshot, snapshot / "transformer", snapshot / ".." / snapshot.name):
        checkpoint = open_checkpoint(folder)
        assert checkpoint.largest.path.parent == tmp_path / "disk" / "wan" / "blobs"
        assert checkpoint.fingerprint()
    assert Checkpoint.components(snapshot) == ["transformer"]
    (tmp_path / "cache").symlink_to(tmp_path)  # the cache itself behind a link
    assert open_checkpoint(tmp_path / "cache" / snapshot.relative_to(tmp_path)).fingerprint()
    with pytest.raises(CheckpointError, match="reads outside the folder"):  # nothing says that it is one
        open_checkpoint(tmp_path / "disk" / "wan" / "snapshots" / snapshot.name)


def test_a_link_in_a_snapshot_does_not_make_other_folders_its_blobs(tmp_path: Path) -> None:
    """What is given lies in a cache by its name; what it leads to must lie in that repository, too."""
    snapshot = _hub_cache(tmp_path)
    other = tmp_path / "models--org--secret" / "snapshots" / ("b" * 40)
    shutil.copytree(snapshot, other, symlinks=True)
    for link in other.rglob("*"):
        if link.is_symlink():
            target = (snapshot / link.relative_to(other)).resolve()
            link.unlink()
            link.symlink_to(target)
    (snapshot.parent / "link").symlink_to(other)
    with pytest.raises(CheckpointError, match="reads outside the folder"):
        open_checkpoint(snapshot.parent / "link")


# ----------------------------------------------------------------------------------------------------------- hub names


def _offline(tmp_path: Path, model: str, **env: str) -> str:
    """What opening ``model`` prints in a fresh process, where the hub's settings are read from the environment."""
    code = f"""
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.errors import CheckpointError
try:
    print("opened", open_checkpoint({model!r}).root)
except CheckpointError as error:
    print(error)
"""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "cache"), **env}
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_hub_name_offline_and_unreachable(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        text = _offline(tmp_path, "org/wan-tiny", **env)
        assert "'org/wan-tiny' is no local folder" in text
        assert "give a local folder" in text


def test_a_hub_name_that_is_cached_opens_offline(tmp_path: Path) -> None:
    snapshot = _hub_cache(tmp_path / "cache")
    assert _offline(tmp_path, "org/wan", HF_HUB_OFFLINE="1") == f"opened {snapshot / 'transformer'}\n"


def test_a_local_folder_wins_over_the_hub(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "org" / "wan")
    assert _offline(tmp_path, "org/wan") == f"opened {tmp_path / 'org' / 'wan'}\n"
    text = _offline(tmp_path, "org/wam")  # the folder org exists: this is a path with a slip of the pen
    assert "there is no folder 'org/wam'" in text
    assert "'wan/'" in text


@pytest.mark.parametrize(
    "model", ["/absent/model", "./absent", "../absent/x", "absent", "a/b/c", "~nobody/x", "", " ", "a\0b", "\ud800/x"]
)
def test_paths_that_do_not_exist(model: str) -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint(model)


def test_the_nearest_parent_is_listed(tmp_path: Path) -> None:
    (tmp_path / "wan2.1").mkdir()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "wan2.2" / "transformer")
    assert f"{tmp_path} holds 'wan2.1/'" in str(caught.value)


def test_truncated_shards_are_found_before_anything_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", 2)
    path = tmp_path / "m" / SHARD2
    whole = path.read_bytes()
    for cut in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="cut short") as caught:
            open_checkpoint(tmp_path / "m")
        assert str(path) in caught.value.what


def test_missing_unexpected_and_misshapen_tensors(tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path / "m")
    expected = {name: tuple(value.shape) for name, value in saved.items()}
    checkpoint = open_checkpoint(tmp_path / "m")
    wrong = {**expected, "blocks.0.weight": (8, 17), "new.bias": (3,)}
    del wrong["blocks.1.weight"]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_shapes(wrong)
    for words in (
        "missing 'new.bias' [3]",
        "unexpected 'blocks.1.weight' [5]",
        "'blocks.0.weight' is [8, 16]",
        "[8, 17]",
    ):
        assert words in caught.value.what
    with pytest.raises(CheckpointError, match="and 7 more"):
        checkpoint.check_shapes({f"n{i}": (1,) for i in range(6)})


def test_unknown_tensors_suggest_the_near_ones(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"no tensor 'block.0.weight'(.|\n)*blocks\.0\.weight"):
        open_checkpoint(tmp_path / "m").read("block.0.weight")


FLOATS = [code for code in DTYPES if code.startswith(("F", "B")) and code != "BOOL"]


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7, 14])
def test_nonfinite_values_are_named(tmp_path: Path, code: str, value: float, place: int) -> None:
    dtype = getattr(torch, DTYPES[code][1])
    tensor = torch.ones(15).to(dtype)
    if code == "F8_E4M3" and value in (float("inf"), float("-inf")):
        value = float("nan")  # the format has no infinity
    tensor[place] = torch.tensor(value).to(dtype)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    save_file({"w": tensor.reshape(3, 5)}, tmp_path / "m" / SINGLE)
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_finite("w", checkpoint.read("w"))
    assert "'w' holds 1 NaN or infinite values of 15" in caught.value.what
    assert f"index [{place // 5}, {place % 5}]" in caught.value.what
    assert "--allow-nonfinite" in str(caught.value)


def test_counting_nonfinite_values(tmp_path: Path) -> None:
    assert count_nonfinite(torch.zeros(0)) == (0, ())
    assert count_nonfinite(torch.ones(3, dtype=torch.int8)) == (0, ())
    assert count_nonfinite(torch.tensor(float("nan"))) == (1, ())
    big = torch.zeros(3, 3_000_001, dtype=torch.float16)
    big[1, 2_999_999] = big[2, 0] = big[2, 5] = float("inf")
    assert count_nonfinite(big) == (3, (1, 2_999_999))
    assert count_nonfinite(big.t()) == (3, (0, 2))


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", 2)
    first = open_checkpoint(tmp_path / "m")
    assert first.fingerprint() == open_checkpoint(tmp_path / "m").fingerprint()
    assert first.fingerprint().startswith("v2-")
    _rewrite_config(num_layers=3)(tmp_path / "m")
    assert open_checkpoint(tmp_path / "m").fingerprint() != first.fingerprint()
    (tmp_path / "m" / SHARD1).unlink()
    with pytest.raises(CheckpointError, match="has gone"):
        first.fingerprint()


def test_a_copy_of_a_model_is_the_same_model(tmp_path: Path) -> None:
    """Another place, other times, another umask, or the links of a hub cache: the same files have one fingerprint."""
    save_checkpoint(tmp_path / "m", 2)
    first = open_checkpoint(tmp_path / "m").fingerprint()
    shutil.copytree(tmp_path / "m", tmp_path / "copy", copy_function=shutil.copyfile)
    for number, path in enumerate((tmp_path / "copy").iterdir()):
        os.utime(path, ns=(number, number))
    assert open_checkpoint(tmp_path / "copy").fingerprint() == first
    snapshot = _hub_cache(tmp_path / "cache")
    save_checkpoint(tmp_path / "single")
    assert open_checkpoint(snapshot).fingerprint() == open_checkpoint(tmp_path / "single").fingerprint() != first


@pytest.mark.parametrize("name", [f"blocks.{i}.weight" for i in range(6)])
def test_other_weights_with_the_same_header_are_another_model(tmp_path: Path, name: str) -> None:
    content = save_checkpoint(tmp_path / "m")
    first = open_checkpoint(tmp_path / "m")
    content[name] = -content[name]
    save_file(content, tmp_path / "m" / SINGLE)
    second = open_checkpoint(tmp_path / "m")
    assert second.headers == first.headers
    assert second.fingerprint() != fingerprint_of(tmp_path)


def fingerprint_of(tmp_path: Path) -> str:
    """The fingerprint of the model that ``save_checkpoint`` writes."""
    save_checkpoint(tmp_path / "again")
    return open_checkpoint(tmp_path / "again").fingerprint()


def test_fingerprints_of_older_releases_are_told_apart() -> None:
    assert fingerprint_hint("v2-" + "0" * 64, "v2-" + "1" * 64) is None
    assert fingerprint_hint("0" * 64, "1" * 64) is None
    assert "older release" in str(fingerprint_hint("0" * 64, "v2-" + "0" * 64))


def test_a_checkpoint_can_be_pickled_and_holds_no_descriptor(tmp_path: Path) -> None:
    """Hundreds of shards need hundreds of files, but not at the same time."""
    saved = save_checkpoint(tmp_path / "m", 3)
    before = set(os.listdir("/proc/self/fd"))
    checkpoint = pickle.loads(pickle.dumps(open_checkpoint(tmp_path / "m")))
    for name, value in saved.items():
        assert torch.equal(checkpoint.read(name), value)
    assert set(os.listdir("/proc/self/fd")) == before
    with mock.patch("os.open", side_effect=OSError(errno.EMFILE, "Too many open files")):
        with pytest.raises(CheckpointError, match="Too many open files"):
            checkpoint.read("blocks.0.weight")
        with pytest.raises(CheckpointError, match="Too many open files"):
            open_checkpoint(tmp_path / "m")


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    """Checking a model takes a blink, and --help does not pay for it either."""
    save_checkpoint(tmp_path / "m", 2)
    code = (
        "import sys; from dvdquant.checkpoint.opening import open_checkpoint;"
        "open_checkpoint(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "m"], cwd=ROOT, check=True)
