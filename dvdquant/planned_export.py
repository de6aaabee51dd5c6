"""The steps of an export that dvdq-export and export_model share: the exporter, and what only the runtime can check or add."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvdquant.export.options import ExportOptions
    from dvdquant.export.plan import ExportPlan
    from dvdquant.export.result import ExportResult
    from dvdquant.hardware.advice import Choice
    from dvdquant.system.progress import Progress

__all__ = ["plan_checked", "run_planned"]


def plan_checked(options: ExportOptions) -> ExportPlan:
    """Plan an export, and check the pipeline that the runtime is to take its other parts from, if it is a local one.

    A pipeline of the hub is left to the runtime: nothing of it is downloaded here.

    Args:
        options: The options of the export.

    Raises:
        DvdquantError: The export cannot be made, or the runtime could not use the pipeline.
    """
    from dvdquant.checkpoint.locate import is_remote
    from dvdquant.deploy.pipelines.parts import open_pipeline_folder
    from dvdquant.export.plan import plan_export

    plan = plan_export(options)
    place = options.pipeline
    if place is not None and not is_remote(place):
        open_pipeline_folder(place, plan.plans[0].family.name)
    return plan


def run_planned(plan: ExportPlan, choice: Choice, progress: Progress) -> ExportResult:
    """Say what was chosen and why, and run an export with its report.

    Args:
        plan: The plan of the export.
        choice: What was chosen for the cards.
        progress: Receiver of the progress and of the notes of the choice.

    Raises:
        DvdquantError: The export failed. The folder is unchanged.
    """
    from dvdquant.deploy.report.page import add_report
    from dvdquant.export.pipeline import run_export

    for note in choice.notes:
        progress.say(note)
    return run_export(plan, progress, add_report)
