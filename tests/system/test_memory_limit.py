"""How much memory a control group leaves: a fake tree of ``/proc`` and ``/sys`` for each way groups are set up."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from dvdquant.system.memory import memory_limit

MIB = 1 << 20
UNLIMITED = 0x7FFFFFFFFFFFF000  # what version 1 says where there is no limit
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have more than any group below."""
    memory = psutil.virtual_memory()._replace(available=1000 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def write(root: Path, folder: str, **files: object) -> None:
    """Write control files; a dot is written as ``__`` in the argument's name."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (root / folder / name.replace("__", ".")).write_text(f"{value}\n")


def own_group(root: Path, text: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)


def test_without_control_groups_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) == 1000 * MIB


def test_page_cache_is_not_in_use(tmp_path: Path) -> None:
    """A container that has just downloaded its checkpoint: 380 of 400 MiB are used, 350 of them are a file's pages."""
    own_group(tmp_path, "0::/\n")
    stat = f"anon {25 * MIB}\nfile {350 * MIB}\nshmem {4 * MIB}\ninactive_file {300 * MIB}\nactive_file {46 * MIB}\n"
    stat += f"slab_reclaimable {2 * MIB}\nslab_unreclaimable {3 * MIB}"
    write(tmp_path, V2, memory__max=400 * MIB, memory__current=380 * MIB, memory__stat=stat)
    assert memory_limit(tmp_path) == (400 - 380 + 300 + 46 + 2) * MIB


def test_page_cache_is_not_in_use_in_version_1(tmp_path: Path) -> None:
    """The totals count, which include groups below as the use does."""
    own_group(tmp_path, "5:cpu,cpuacct:/a\n4:memory:/\n0::/\n")
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {200 * MIB}\ntotal_active_file {100 * MIB}"
    write(tmp_path, V1, memory__limit_in_bytes=400 * MIB, memory__usage_in_bytes=380 * MIB, memory__stat=stat)
    assert memory_limit(tmp_path) == 320 * MIB


@pytest.mark.parametrize("tightest", ["", "/pod", "/pod/container"])
def test_every_group_above_the_own_one_is_asked(tmp_path: Path, tightest: str) -> None:
    own_group(tmp_path, "0::/pod/container\n")
    for group in ("", "/pod", "/pod/container", "/other"):
        limit = 100 * MIB if group == tightest else 500 * MIB
        limit = MIB if group == "/other" else limit
        write(tmp_path, V2 + group, memory__max=limit, memory__current=10 * MIB)
    assert memory_limit(tmp_path) == 90 * MIB


def test_nested_groups_of_version_1(tmp_path: Path) -> None:
    own_group(tmp_path, "7:hugetlb,memory:/job/step\n1:name=systemd:/elsewhere\n")
    write(tmp_path, f"{V1}/job/step", memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes=MIB)
    write(tmp_path, f"{V1}/job", memory__limit_in_bytes=50 * MIB, memory__usage_in_bytes=20 * MIB)
    write(tmp_path, V1, memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes=900 * MIB)
    assert memory_limit(tmp_path) == 30 * MIB


@pytest.mark.parametrize(
    ("maximum", "high", "left"), [("max", 80, 70), (80, "max", 70), (60, 80, 50), ("max", "max", 1000)]
)
def test_the_lower_of_max_and_high(tmp_path: Path, maximum: int | str, high: int | str, left: int) -> None:
    own_group(tmp_path, "0::/a\n")
    texts = [value if isinstance(value, str) else value * MIB for value in (maximum, high)]
    write(tmp_path, f"{V2}/a", memory__max=texts[0], memory__high=texts[1], memory__current=10 * MIB)
    assert memory_limit(tmp_path) == left * MIB


@pytest.mark.parametrize("path", ["/docker/0123", "/../../user.slice", "/", ""])
def test_a_container_whose_path_is_the_hosts(tmp_path: Path, path: str) -> None:
    """Only the container's own group is mounted, under a path that says otherwise."""
    own_group(tmp_path, f"0::{path}\n")
    write(tmp_path, V2, memory__max=100 * MIB, memory__current=40 * MIB)
    write(tmp_path, "sys/user.slice", memory__max=MIB, memory__current=0)  # what ".." would reach
    assert memory_limit(tmp_path) == 60 * MIB


def test_files_that_cannot_be_read_or_make_no_sense(tmp_path: Path) -> None:
    """What is not known does not raise the limit, and does not end the program."""
    own_group(tmp_path, "nonsense\n0::/a/b\n:::\n")
    (tmp_path / V2 / "a/b/memory.current").mkdir(parents=True)  # reading it fails
    write(tmp_path, f"{V2}/a/b", memory__max=70 * MIB, memory__stat="inactive_file\nactive_file many\n\n\xff")
    write(tmp_path, f"{V2}/a", memory__max="-1", memory__high="", memory__current="?")
    write(tmp_path, V2, memory__max="9" * 30, memory__current=5)
    assert memory_limit(tmp_path) == 70 * MIB


def test_it_is_never_below_zero_nor_above_the_limit(tmp_path: Path) -> None:
    own_group(tmp_path, "0::/a\n")
    write(tmp_path, f"{V2}/a", memory__max=10 * MIB, memory__current=12 * MIB)
    assert memory_limit(tmp_path) == 0
    # The two files are read one after the other: the page cache may have grown in between.
    write(tmp_path, f"{V2}/a", memory__stat=f"inactive_file {20 * MIB}")
    assert memory_limit(tmp_path) == 10 * MIB
