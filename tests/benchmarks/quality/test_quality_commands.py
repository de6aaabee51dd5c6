"""The commands of benchmarks/quality: listed, each with a main, and named in the README as they are."""

from __future__ import annotations

import re
import subprocess
import sys

from benchmarks.quality.__main__ import COMMANDS
from tests.support.quality_scripts import QUALITY, script

ROOT = QUALITY.parents[1]


def test_without_a_command_they_are_listed() -> None:
    for arguments, code in (([], 2), (["--help"], 0), (["nonsense"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.quality", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
        assert all(name in done.stderr for name in COMMANDS)


def test_each_is_a_module_with_a_main() -> None:
    for name in COMMANDS:
        assert callable(script(name).main)
        assert (QUALITY / f"{name}.py").is_file()  # figures name the commands by their paths, too


def test_pages_name_commands_that_exist() -> None:
    for page in (QUALITY / "README.md", ROOT / "docs" / "quality" / "index.md"):
        text = page.read_text()
        named = set(re.findall(r"-m benchmarks\.quality (\w+)", text))
        assert named
        assert named <= set(COMMANDS)
        for path in re.findall(r"benchmarks/quality/[\w/]+\.(?:py|cpp|jsonl\.xz)", text):
            assert (ROOT / path).is_file(), path
