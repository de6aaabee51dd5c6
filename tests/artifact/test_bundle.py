"""Bundles: what was packed is unpacked, and of a tar that is anything else nothing is left on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dvdquant.artifact import unpack as unpacking
from dvdquant.artifact.bundle import open_bundle, write_bundle
from dvdquant.artifact.manifest import Manifest, load_manifest
from dvdquant.artifact.unpack import unpack_bundle
from dvdquant.artifact.verify_files import verify_files
from dvdquant.errors import DvdquantError, OutputError, ResourceError, UnsupportedError
from tests.support.changed_bytes import mutated
from tests.support.costs import Costs
from tests.support.folders import memory_folder
from tests.support.written_exports import manifest

CONTENTS = {"config.json": b"{}\n", "onnx/transformer.safetensors": bytes(range(256)) * 40, "onnx/empty.bin": b""}
# A plugin library by its head and its marks: for aarch64 and TensorRT 10.
LIBRARY = (
    b"\x7fELF\x02\x01\x01"
    + bytes(9)
    + b"\x03\x00\xb7\x00"
    + bytes(44)
    + b"@dvdquant-plugin tensorrt=10\0"
    + b"p" * 5000
)
OTHERS = {"README.md": b"what to do\n", "plugins/libdvdquant_plugins.so": LIBRARY}
BUILD = {
    "engine": "engines/tensorrt-sm87/transformer_a4.engine", "component": "transformer", "graph": "onnx/empty.bin",
    "backend": "tensorrt", "sm": ["8.7"], "act_bits": 4, "precision": "plugin", "executes": "the plugin", "onnx_sha256": "0" * 64,
    "profile": None, "fp8_attentions": 0, "builder_bytes": 3000, "held_bytes": 2000, "optimization_level": None,
    "workspace_gib": None, "command": "",
}  # fmt: skip


def entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An export of three files."""
    folder = tmp_path / "out"
    for name, data in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    files = {name: entry(data) for name, data in CONTENTS.items()}
    export = manifest(files=files, engines=[], graphs=[], builds=[BUILD])
    (folder / "manifest.json").write_text(export.to_json())
    return folder


def pack(out: Path, target: Path) -> str:
    return write_bundle(target, out, load_manifest(out), OTHERS)


def unpack(path: Path, target: Path) -> Manifest:
    with open_bundle(path) as bundle:
        return unpack_bundle(bundle, target)


def test_there_and_back(out: Path, tmp_path: Path) -> None:
    digest = pack(out, tmp_path / "a.tar")
    assert digest == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
    assert pack(out, tmp_path / "b.tar") == digest, "the same export gives the same bytes"
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames()[:2] == ["bundle.json", "manifest.json"]
    there = unpack(tmp_path / "a.tar", tmp_path / "there")
    assert there == load_manifest(tmp_path / "there")
    assert set(there.files) == {*CONTENTS, *OTHERS}
    verify_files(tmp_path / "there", there)
    for name, data in {**CONTENTS, **OTHERS}.items():
        assert (tmp_path / "there" / name).read_bytes() == data
    assert unpack(tmp_path / "a.tar", tmp_path / "there") == there, "once more, over what is there"


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def rewrite(path: Path, change: Callable[[list[Any]], None]) -> None:
    """Write the members again after a change: (name, bytes) or a TarInfo with its bytes."""
    content: list[Any] = list(members(path))
    change(content)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in content:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(name, tarfile.TarInfo):
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def record(change: Callable[[Any], None]) -> Callable[[list[Any]], None]:
    """A change of bundle.json."""

    def apply(content: list[Any]) -> None:
        data = json.loads(content[0][1])
        change(data)
        content[0] = ("bundle.json", json.dumps(data).encode())

    return apply


def renamed(name: str) -> Callable[[list[Any]], None]:
    """The configuration under another name, in the tar and in its record."""

    def apply(content: list[Any]) -> None:
        record(lambda data: data["files"][1].update(path=name))(content)
        content[2] = (name, content[2][1])

    return apply


def instead(kind: bytes, target: str = "") -> Callable[[list[Any]], None]:
    """A member of another kind in the place of the configuration."""

    def apply(content: list[Any]) -> None:
        info = tarfile.TarInfo(content[2][0])
        info.type, info.linkname = kind, target
        content[2] = (info, b"")

    return apply


ATTACKS: dict[str, Callable[[list[Any]], None]] = {
    "a parent path": renamed("../evil"),
    "a parent inside": renamed("onnx/../../evil"),
    "an absolute path": renamed("/tmp/evil"),
    "a drive": renamed("C:evil"),
    "the lock": renamed(".lock"),
    "a stage": renamed(".tmp-0123456789abcdef/tree/x"),
    "a control character": renamed("a\nb"),
    "a symbolic link": instead(tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": instead(tarfile.LNKTYPE, "manifest.json"),
    "a pipe": instead(tarfile.FIFOTYPE),
    "a device": instead(tarfile.CHRTYPE),
    "a folder": instead(tarfile.DIRTYPE),
    "a sparse file": instead(tarfile.GNUTYPE_SPARSE),
    "an extended header": lambda content: content.insert(
        2, (_typed("x", tarfile.XHDTYPE, 30), b"29 path=../evil\n" + b"0" * 14)
    ),
    "a long name": lambda content: content.insert(2, (_typed("x", tarfile.GNUTYPE_LONGNAME, 9), b"../../evi")),
    "a member more": lambda content: content.append(("evil", b"x")),
    "a member less": lambda content: content.pop(),
    "another order": lambda content: content.insert(2, content.pop(3)),
    "a member twice": lambda content: content.append(content[2]),
    "no record": lambda content: content.pop(0),
    "a size": record(lambda data: data["files"][2].update(bytes=9)),
    "a huge size": record(lambda data: data["files"][2].update(bytes=1 << 60)),
    "a negative size": record(lambda data: data["files"][2].update(bytes=-1)),
    "a digest": record(lambda data: data["files"][2].update(sha256="0" * 64)),
    "an unknown field": record(lambda data: data.update(run="rm")),
    "another format": record(lambda data: data.update(format=2)),
    "a file twice": record(lambda data: data["files"].append(data["files"][1])),
    "no manifest": record(lambda data: data["files"].pop(0)),
    "an SM": record(lambda data: data.update(sm=["all"])),
    "no JSON": lambda content: content.__setitem__(0, ("bundle.json", b"{")),
    "nested JSON": lambda content: content.__setitem__(0, ("bundle.json", b"[" * 100000)),
}


def _typed(name: str, kind: bytes, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_dvdq_bundle_never_wrote_is_refused_and_leaves_nothing(attack: str, out: Path, tmp_path: Path) -> None:
    path, target = tmp_path / "a.tar", tmp_path / "there"
    pack(out, path)
    rewrite(path, ATTACKS[attack])
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((OutputError, ResourceError)) as caught:
        unpack(path, target)
    assert caught.value.fix
    assert sorted(os.listdir(tmp_path)) == before, "no folder, and nothing beside it"


@pytest.mark.parametrize(
    ("field", "claim", "found"),
    [
        ("sm", ["11.0"], '["8.7"]'),
        ("sm", ["8.7", "11.0"], '["8.7"]'),
        ("builders", ["tensorrt_rtx"], '["tensorrt"]'),
        ("builder_bytes", 1, "3000"),
        ("held_bytes", 1, "2000"),
        ("machine", "x86_64", '"aarch64"'),
        ("machine", None, '"aarch64"'),
        ("tensorrt_major", 11, "10"),
    ],
)
def test_a_record_that_claims_what_the_bundle_does_not_hold_is_refused_when_it_is_opened(
    field: str, claim: object, found: str, out: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.tar"
    pack(out, path)
    rewrite(path, record(lambda facts: facts.update({field: claim})))
    with (
        pytest.raises(
            OutputError, match=re.escape(f"says {field} {json.dumps(claim)}, and ") + ".*" + re.escape(found)
        ),
        open_bundle(path),
    ):
        raise AssertionError("it was opened")


def test_the_library_is_checked_when_a_bundle_is_opened(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    pack(out, path)
    with open_bundle(path) as bundle:
        assert bundle.library is not None
        assert (bundle.library.machine, bundle.library.tensorrt_major) == ("aarch64", 10)
    for data, right, words in (
        (LIBRARY.replace(b"=10", b"=11"), False, "was changed"),
        (LIBRARY.replace(b"=10", b"=11"), True, "tensorrt_major 10, and .* 11"),
        (LIBRARY.replace(b"\x7fELF", b"MZ.."), True, "is no plugin library"),
        (LIBRARY.replace(b"@dvdquant", b"@anything"), True, "is no plugin library of dvdquant"),
        (b"", True, 'machine "aarch64", and .* null'),
    ):
        pack(out, path)

        def change(content: list[Any], data: bytes = data, right: bool = right) -> None:
            assert content[-1][0] == "plugins/libdvdquant_plugins.so"
            content[-1] = (content[-1][0], data)
            if right:
                record(lambda facts: facts["files"][-1].update(entry(data)))(content)

        rewrite(path, change)
        with pytest.raises(OutputError, match=words), open_bundle(path):
            raise AssertionError("it was opened")


def test_a_file_without_the_mark_of_the_plugin_is_not_packed(out: Path, tmp_path: Path) -> None:
    others = {**OTHERS, "plugins/libdvdquant_plugins.so": LIBRARY.replace(b"@dvdquant", b"@anything")}
    with pytest.raises(UnsupportedError, match="is no plugin library of dvdquant"):
        write_bundle(tmp_path / "a.tar", out, load_manifest(out), others)
    assert not (tmp_path / "a.tar").exists()


def test_a_bundle_from_before_builders_were_recorded_is_opened(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    pack(out, path)
    rewrite(path, record(lambda facts: facts.pop("builders")))
    assert unpack(path, tmp_path / "there").builds == (BUILD,)


def test_a_changed_manifest_is_refused(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    pack(out, path)

    def change(content: list[Any]) -> None:
        data = content[1][1].replace(b'"bytes": 3', b'"bytes": 4')
        assert data != content[1][1]
        content[1] = ("manifest.json", data)
        record(lambda facts: facts["files"][0].update(entry(data)))(content)

    rewrite(path, change)
    with pytest.raises(OutputError, match="its files are not those of its manifest"):
        unpack(path, tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("count", [30, pytest.param(5000, marks=pytest.mark.stress)])
def test_a_changed_byte_never_reaches_the_folder(count: int, out: Path, tmp_path: Path) -> None:
    path, target = tmp_path / "a.tar", tmp_path / "there"
    pack(out, path)
    raw = path.read_bytes()
    chance = random.Random(1)
    refused = 0
    for _ in range(count):
        data = bytearray(raw)
        place = chance.randrange(len(data))
        data[place] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            there = unpack(path, target)
        except OutputError:
            refused += 1
            assert not target.exists()
            continue
        # Bits of a header that say nothing (times, owners) and of the filling: what is there is right all the same.
        assert there.files == {name: entry(data) for name, data in {**CONTENTS, **OTHERS}.items()}
        verify_files(target, there)
        shutil.rmtree(target)
    assert refused > count / 2


# What a member may be called, and where it may point.
NAMES = (
    "../evil", "/dev/shm/evil", "onnx/../../evil", "evil", ".lock", ".tmp-0123456789abcdef/x", "manifest.json",
    "bundle.json", "onnx", "config.json/x", "a\nb", "\u202ex", "\udcff", "x" * 100, "./config.json", "onnx//x", "C:x", "",
    ".commit",
)  # fmt: skip
KINDS = (*b"012345678DKLMNSVXgx", 0, 255)
SIZES = (0, 1, 511, 512, 513, 1 << 20, 1 << 33, 1 << 60, (1 << 63) - 1)


def made_up(content: list[Any], chance: random.Random) -> None:
    """Change members: other kinds, names, sizes, places, contents; the record often says the same."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at, way = chance.randrange(len(content)), chance.randrange(9)
        name, data = content[at]
        name = name.name if isinstance(name, tarfile.TarInfo) else name
        if way == 0:
            info = tarfile.TarInfo(name)
            info.type = bytes([chance.choice(KINDS)])
            info.linkname = chance.choice(NAMES)[:100]
            content[at] = (info, data)
            if chance.random() < 0.5:
                info.size = len(data)
        elif way == 1:
            content[at] = (chance.choice(NAMES), data)
        elif way == 2:
            content.insert(chance.randrange(len(content) + 1), (chance.choice((name, *NAMES)), data))
        elif way == 3 and len(content) > 1:
            del content[at]
        elif way == 4:
            info = tarfile.TarInfo(name)
            info.size = chance.choice(SIZES)
            content[at] = (info, data)
        elif way == 5:
            content[at] = (name, mutated(data or b"\0", 200, chance))
        elif content and content[0][0] == "bundle.json":
            with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
                facts = json.loads(content[0][1])
                entry_of = chance.choice(facts["files"])
                if way == 6:  # under another name, in both places
                    new = chance.choice(NAMES)
                    content[:] = [(new if n == entry_of["path"] else n, d) for n, d in content]
                    entry_of["path"] = new
                elif way == 7:
                    entry_of[chance.choice(["bytes", "path", "sha256", "mode"])] = chance.choice(
                        [*SIZES, *NAMES, -1, None, [], 1.5, True]
                    )
                else:  # the record of what is there
                    facts["files"] = [{"path": n, **entry(d)} for n, d in content[1:] if isinstance(n, str)]
                content[0] = ("bundle.json", json.dumps(facts).encode())


def changed_bundle(whole: bytes, content: list[Any], chance: random.Random) -> bytes:
    """A bundle with changed bytes, with changed headers (the checksum right), or with members that are made up."""
    way = chance.randrange(3)
    if way == 0:
        return mutated(whole, len(whole), chance)
    if way == 1:
        raw, headers, at = bytearray(whole), [], 0
        while whole[at : at + 1].strip(b"\0"):
            headers.append(at)
            at += 512 + -(-int(whole[at + 124 : at + 135], 8) // 512) * 512
        for start in chance.sample(headers, chance.choice((1, 1, 2))):
            head = bytearray(mutated(whole[start : start + 512], 512, chance)[:512].ljust(512, b"\0"))
            head[148:156] = b" " * 8
            head[148:156] = b"%06o\0 " % sum(head)
            raw[start : start + 512] = head
        return bytes(raw)
    members_of = list(content)
    made_up(members_of, chance)
    file = io.BytesIO()
    for name, data in members_of:
        info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
        if not isinstance(name, tarfile.TarInfo):
            info.size = len(data)
        file.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        file.write(data + bytes(-len(data) % 512))
    end = file.tell() + 1024
    return file.getvalue() + bytes(-(-end // 10240) * 10240 - file.tell())


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [150, pytest.param(20_000, marks=pytest.mark.stress)])
def test_mutated_bundles(count: int, out: Path, tmp_path: Path) -> None:
    """Each is unpacked whole or refused in words; nothing is written beside the folder, and no half of one is left."""
    pack(out, tmp_path / "a.tar")
    whole, content = (tmp_path / "a.tar").read_bytes(), members(tmp_path / "a.tar")
    with memory_folder() as folder, Costs("bundles") as costs:
        place = Path(folder)
        path, target = place / "a.tar", place / "there"
        good = 0
        for index in range(count):
            path.write_bytes(changed_bundle(whole, content, random.Random(f"{count} {index}")))
            try:
                with costs.case():
                    there = unpack(path, target)
            except DvdquantError as error:
                words = str(error)
                assert len(words) < 3000
                assert not set(words.replace("\n", "")) & set(map(chr, [*range(32), 0x202E])), words
                assert not target.exists()
            except Exception as error:
                raise AssertionError(f"case {index} of {count}") from error
            else:
                good += 1
                verify_files(target, there)
                found = {item.relative_to(target).as_posix(): item for item in target.rglob("*") if not item.is_dir()}
                assert set(found) - {".lock"} == {*there.files, "manifest.json"}
                assert not any(item.is_symlink() for item in target.rglob("*"))
                shutil.rmtree(target)
            assert os.listdir(place) == ["a.tar"]
            assert not Path("/dev/shm/evil").exists()
        assert 0 < good < count / 2


@pytest.mark.parametrize("length", [0, 1, 511, 512, 1000, 5000, -1, -511])
def test_a_cut_file_is_refused(length: int, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    pack(out, path)
    whole = sum(512 + -(-len(data) // 512) * 512 for _, data in members(path))
    raw = path.read_bytes()[:whole]
    path.write_bytes(raw[:length])
    with pytest.raises(OutputError, match=r"a\.tar"):
        unpack(path, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_an_older_export_stays_where_the_bundle_is_refused(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    pack(out, path)
    unpack(path, tmp_path / "there")
    before = {p: p.read_bytes() for p in (tmp_path / "there").rglob("*") if p.is_file()}
    rewrite(path, ATTACKS["a digest"])
    with pytest.raises(OutputError):
        unpack(path, tmp_path / "there")
    assert {p: p.read_bytes() for p in (tmp_path / "there").rglob("*") if p.is_file()} == before


def test_too_little_disk_is_refused_before_anything_is_written(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(out, tmp_path / "a.tar")

    def full(path: Path, nbytes: int, what: str) -> None:
        raise ResourceError(f"{what} needs {nbytes}", fix="free some")

    monkeypatch.setattr(unpacking, "require_disk", full)
    with pytest.raises(ResourceError, match=r"what the bundle holds needs 1[0-9]{4}"):
        unpack(tmp_path / "a.tar", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_packing_refuses_a_changed_export(out: Path, tmp_path: Path) -> None:
    (out / "config.json").write_bytes(b"[]\n")
    with pytest.raises(OutputError, match=r"config\.json does not match its manifest"):
        pack(out, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()
    (out / "config.json").write_bytes(b"longer than it was")
    with pytest.raises(OutputError, match=r"config\.json does not match its manifest"):
        pack(out, tmp_path / "a.tar")


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"PK\x03\x04" * 400)
    with pytest.raises(OutputError, match="is no bundle"):
        unpack(tmp_path / "a.tar", tmp_path / "there")
    with pytest.raises(OutputError, match="cannot be read"):
        unpack(tmp_path / "missing.tar", tmp_path / "there")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not a regular file"):
        unpack(tmp_path / "pipe", tmp_path / "there")
