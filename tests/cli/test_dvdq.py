"""``dvdq``: the commands of one table as subcommands, found, completed, and fast to their first line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dvdquant.cli.commands import COMMANDS
from dvdquant.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
TINY = "examples/tiny-wan"


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


def test_the_table_and_the_scripts_are_the_same() -> None:
    scripts = {f"dvdq-{e.name}": f"{e.module}:main" for e in COMMANDS.values() if e.script}
    assert {"dvdq": "dvdquant.cli.main:main", **scripts} == SCRIPTS
    for entry in COMMANDS.values():
        assert isinstance(import_module(entry.module).main, click.Command)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_subcommand_calls_it_by_its_name(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"], prog_name="dvdq")
    assert result.exit_code == 0
    assert f"Usage: dvdq {name}" in result.output
    assert f"dvdq {name} " in result.output.partition("Examples:")[2]
    assert f"dvdq-{name} " not in result.output


def test_what_is_not_there_gets_the_near_names() -> None:
    result = CliRunner().invoke(main, ["exprot", TINY])
    assert result.exit_code == 2
    for part in ("no command 'exprot'", "available: export, run", "fix: try export"):
        assert part in result.output


def test_the_old_names_are_taken_too() -> None:
    assert "Usage: dvdq plan" in CliRunner().invoke(main, ["dvdq-plan", "--help"], prog_name="dvdq").output


def test_python_m_lists_the_commands_and_runs_them() -> None:
    listed = python("-m", "dvdquant")
    assert listed.returncode == 0
    assert all(e.purpose.split()[0] in listed.stdout and e.name in listed.stdout for e in COMMANDS.values())
    refused = python("-m", "dvdquant", "inspect", "/nowhere/at/all")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: /nowhere/at/all")
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("words", "number", "found"),
    [("dvdq ex", "1", "export"), ("dvdq export --rec", "2", "--recipe"), ("dvdq inspect --la", "2", "--layers")],
)
def test_completion(words: str, number: str, found: str) -> None:
    code = "from dvdquant.cli.main import main; main(prog_name='dvdq')"
    done = python("-c", code, COMP_WORDS=words, COMP_CWORD=number, _DVDQ_COMPLETE="bash_complete")
    assert f"plain,{found}" in done.stdout.splitlines()
    assert "error" not in done.stderr


EARLY = {
    "model": (["export", "nosuch", "-o", "/tmp/x"], "no folder 'nosuch'"),
    "dtype": (["export", TINY, "-o", "/tmp/x", "--dtype", "fp8"], "unknown dtype"),
    "target": (["export", TINY, "-o", "/tmp/x", "--target", "trt"], "unknown target"),
    "device": (["export", TINY, "-o", "/tmp/x", "--device", "gpu"], "unknown device"),
    "output": (["export", TINY, "-o", TINY], "not a dvdquant export"),
    "no export": (["run", "/nowhere", "--prompt", "x", "-o", "/tmp/x.mp4"], "not a dvdquant export"),
    "cache": (["run", "/nowhere", "--prompt", "x", "-o", "/tmp/x.mp4", "--cache", "much"], "--cache"),
    "policy": (["run", "/nowhere", "--prompt", "x", "-o", "/tmp/x.mp4", "--cache-policy", "tea"], "--cache-policy"),
    "no cache": (
        ["run", "/nowhere", "--prompt", "x", "-o", "/tmp/x.mp4", "--cache", "off", "--cache-policy", "easycache"],
        "--cache is off",
    ),
    "plan": (["plan", "/nowhere", "--prompt", "x"], "not a dvdquant export"),
}


def test_mistakes_are_said_before_pytorch_is_loaded() -> None:
    """All in one process, in which a later import of torch would show."""
    code = f"""
import sys
from click.testing import CliRunner
from dvdquant.cli.main import main
for arguments, words in {list(EARLY.values())!r}:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, (arguments, result.output, result.exception)
    assert words in result.output, (arguments, result.output)
    assert "torch" not in sys.modules, arguments
    assert "loading" not in result.output
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_first_line_does_not_wait_for_pytorch() -> None:
    """It comes from a process in which torch is not loaded, whatever time that takes here."""
    code = """
import builtins, sys
real = builtins.__import__
def stop(name, *rest):
    if name.partition(".")[0] == "torch":
        print("now torch", file=sys.stderr, flush=True)
        raise SystemExit(7)
    return real(name, *rest)
builtins.__import__ = stop
from dvdquant.cli.main import main
main(["export", "examples/tiny-wan", "-o", "/tmp/no-such-folder-of-dvdq", "--dry-run"], prog_name="dvdq")
"""
    started = time.monotonic()
    done = python("-c", code)
    assert done.returncode == 7, done.stderr
    assert done.stderr.splitlines() == ["loading PyTorch and the exporter …", "now torch"]
    assert time.monotonic() - started < 120  # a hang guard: a second on a machine with nothing else to do
