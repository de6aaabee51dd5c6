"""Run the fault campaign, and write its figures as the tables of docs/fault-campaign.md.

    python -m tests.support.run_campaign                    all, one after the other: an hour of one core
    python -m tests.support.run_campaign gguf kills         some
    python -m tests.support.run_campaign --list
    python -m tests.support.run_campaign --out figures.md   where the tables go besides the terminal

Each part is a fuzzer of the test suite at its full count. A case fails that ends in another error than ours (a traceback), takes
30 seconds or more, or makes the process grow by 1 GiB; so does everything else that its test asserts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.commit import commit
from dvdquant.system.processor import processor_name, usable_cores
from tests.support.costs import RECORD

ROOT = Path(__file__).resolve().parents[2]

PARTS = {
    "safetensors": "tests/system/test_safetensors_reader.py::test_random_mutations_never_crash[100000]",
    "indexes": "tests/checkpoint/test_checkpoint_attacks.py::test_mutated_configs_and_indexes[100000]",
    "gguf": "tests/checkpoint/formats/test_gguf.py::test_mutations[20000]",
    "single-files": "tests/checkpoint/formats/test_formats.py::test_mutations[7000-",
    "lora": "tests/checkpoint/lora/test_lora_attacks.py::test_mutated_files[20000]",
    "model-folders": "tests/checkpoint/test_untrusted.py::test_mutations[6000-",
    "configs": "tests/model/families/test_configs.py::test_mutated_configs_are_planned_or_refused[16000]",
    "schedulers": "tests/deploy/pipelines/test_scheduler_config.py::test_mutated_configs_5000",
    "records": "tests/artifact/test_manifest_attacks.py::test_mutated_records[",
    "bundles": "tests/artifact/test_bundle.py::test_mutated_bundles[20000]",
    "pictures": "tests/deploy/serve/request/test_serve_pictures.py::test_changed_files_are_decoded_or_refused[20000]",
    "comfyui": "tests/deploy/comfyui/test_comfyui_attacks.py::test_nodes_take_or_refuse_whatever_they_are_given[20000]",
    "output-folders": "tests/artifact/test_hostile_output.py::test_random_hostile_folders[20000]",
    "prompts": "tests/cli/clips/test_prompt_file.py::test_any_bytes_at_length",
    "command-lines": "tests/cli/shared/test_command_lines.py::test_no_command_line_of_all_ends_in_a_traceback",
    "kills": "tests/artifact/test_kill_and_full_disk.py::test_random_kills_then_resume_is_bit_identical[200]",
}
"""Part -> a test, or the beginning of several; those of the normal run are left out."""


def main() -> int:
    """Run the parts that are named, all by default; returns 1 where a test failed."""
    parser = argparse.ArgumentParser(description="the fault campaign")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="the parts and their tests")
    parser.add_argument("--out", type=Path, help="a file for the tables")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{part:16}{test}" for part, test in PARTS.items()))
        return 0
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    lines: list[dict[str, object]] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="dvdquant-campaign-") as folder:
        for part in options.parts or PARTS:
            record = Path(folder) / part
            code = _run(PARTS[part], record)
            failed |= code != 0
            found = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
            lines += found or [{"parser": f"{part}: no figures", "cases": 0, "failed": True}]
            if code and found:
                lines[-1]["failed"] = True
    text = _table(lines)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return int(failed)


def _run(test: str, record: Path) -> int:
    """Run one part with its figures written to ``record``; returns pytest's exit code."""
    file, _, name = test.partition("::")
    chosen = [test]
    if name.endswith(("[", "-")):  # several: pytest takes no beginnings of names
        chosen = [file, "-k", name.partition("[")[0], "-m", "stress"]
    command = [sys.executable, "-m", "pytest", "-q", "--timeout", "7200", "-p", "no:cacheprovider", *chosen]
    print(f"== {test}", flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, RECORD: str(record)}, check=False).returncode


def _table(lines: list[dict[str, object]]) -> str:
    """Return the figures as Markdown, with date, commit and hardware."""
    rows = [
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, commit {commit() or 'unknown'}, {usable_cores()} cores of "
        f"{processor_name()}, Python {sys.version.split()[0]}.",
        "",
        "| read by | cases | refused | longest case | memory grew by | failed |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in lines:
        slowest = f"{line['slowest']:.2f} s" if line.get("slowest") else "—"
        grown = f"{line['grown']} MiB" if line.get("grown") is not None else "—"
        failed = "yes" if line["failed"] else "0"
        rows.append(
            f"| {line['parser']} | {line['cases']} | {line.get('refused') or '—'} | {slowest} | {grown} | {failed} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
