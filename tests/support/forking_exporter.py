"""A process that has imported and traced everything, and forks one export for every line it reads.

Protocol, JSON lines: ``{"model": …, "out": …, "sms": […], "resume": bool, "fault": …}`` in; ``{"pid": …}`` and then
``{"status": …, "peak_bytes": …, "error": …, "failed": …}`` out. ``fault`` is None or [errno, number of the writing call that
fails], and ``failed`` the name of that call, None if the export made fewer. ``error`` ends with the traceback if it is no
refusal. An export leads a process group of its own, and has engines if there are ``sms``, else graphs of every flavour.
Tracing happens once, before the forks: a killed export then dies in the stages that write, not in an import.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from dvdquant.errors import DvdquantError
from dvdquant.export import pipeline
from dvdquant.export.options import ExportOptions
from dvdquant.export.plan import ExportPlan, plan_export
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress
from tests.support.faults import WRITES, Faults
from tests.support.traces import share_traces, traced


def options(request: dict[str, Any]) -> ExportOptions:
    """Of the smallest export with two bit-widths."""
    return ExportOptions(
        request["model"],
        Path(request["out"]),
        get_recipe("w4a4"),
        targets=("rtx",) if request["sms"] else ("onnx",),
        sms=tuple(request["sms"]),
        latent="2x8x8",
        text_tokens=4,
        resume=request.get("resume", False),
        replace=True,
    )


def export(request: dict[str, Any], plan: ExportPlan, report: int) -> None:
    """One export in this (forked) process; never returns."""
    os.setsid()
    gc.disable()  # a collection would copy every page of what was imported
    error, code, faults, write = None, 0, None, os.write
    if request.get("fault"):
        number, at = request["fault"]
        faults = Faults(number, at, WRITES)
        faults.install()
    try:
        pipeline.run_export(plan, Progress("quiet"))
    except DvdquantError as problem:
        error, code = f"{type(problem).__name__}: {problem}", 2
    except BaseException:  # noqa: BLE001
        error, code = traceback.format_exc(), 1
    write(report, json.dumps({"error": error, "failed": faults.failed if faults else None}).encode())
    os._exit(code)


def main() -> None:
    """Serve until stdin closes."""
    torch.set_num_threads(1)  # no pool of OpenMP threads, which a fork would not inherit
    share_traces()
    # The space check would refuse before anything is written; here the disk is to fill up half-way.
    pipeline.require_disk = lambda *_: None  # type: ignore[attr-defined]
    for line in sys.stdin:
        request = json.loads(line)
        plan = plan_export(options(request))
        traced(plan.plans[0], plan.sizes)
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reader)
            export(request, plan, writer)
        os.close(writer)
        print(json.dumps({"pid": pid}), flush=True)
        said = os.read(reader, 1 << 16)
        os.close(reader)
        _, status, used = os.wait4(pid, 0)
        answer = {"status": status, "peak_bytes": used.ru_maxrss * 1024}
        print(json.dumps({**answer, **(json.loads(said) if said else {"error": None})}), flush=True)
