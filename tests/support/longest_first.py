"""Test processes that share the work take the dearest files first, so that none is left alone with one at the end."""

from __future__ import annotations

from pathlib import Path

__all__ = ["LONGEST", "longest_first"]

# Below tests/, by processor seconds (``--cpu-seconds 40`` lists them anew); the order of all others does not matter.
LONGEST = (
    "quantize/test_quantize.py",
    "artifact/test_write_faults.py",
    "deploy/generation/test_image_pipelines.py",
    "kernels/test_gpu_check.py",
    "export/graph/test_onnx_graphs.py",
    "deploy/sessions/test_fusion.py",
    "export/verify/test_verify_stored.py",
    "deploy/pipelines/test_transformer_requests.py",
    "quantize/test_bgr.py",
    "deploy/pipelines/test_transformer_dropin.py",
    "export/test_device_build.py",
    "deploy/sessions/test_sessions.py",
    "deploy/pipelines/test_pipelines.py",
    "deploy/planning/test_planner.py",
    "export/verify/test_verify_layers.py",
    "export/passes/test_fp8_attention.py",
    "test_repository.py",
    "deploy/sessions/test_lora_inputs.py",
    "quantize/backends/test_jit.py",
    "quantize/test_magnitudes.py",
    "benchmarks/quality/test_quality_simulate.py",
    "artifact/test_transaction_faults.py",
    "cli/test_cli_help.py",
    "cli/clips/test_run_cli.py",
    "export/engines/test_builders.py",
    "checkpoint/test_untrusted.py",
    "model/families/test_configs.py",
    "test_docs.py",
    "export/test_pipeline.py",
    "deploy/sessions/test_guidance_pair.py",
    "benchmarks/test_step_time.py",
    "test_import_graph.py",
    "checkpoint/formats/test_formats.py",
    "deploy/report/test_report_text.py",
    "benchmarks/quality/test_quality_report.py",
    "deploy/sessions/test_compiled.py",
    "quantize/backends/test_quantizer_kernels.py",
    "artifact/test_manifest_attacks.py",
    "artifact/test_transaction_resume.py",
    "cli/shared/test_command_lines.py",
    "export/passes/lowering/test_lowering.py",
    "ops/cuda/test_cuda_binding.py",
    "artifact/test_hostile_output.py",
    "deploy/sessions/test_session_attention.py",
)
_PLACES = {name: place for place, name in enumerate(LONGEST)}


def longest_first(path: Path, tests: Path) -> int:
    """Return the place of a test file in the order; those that are not named stay behind, as they were.

    Args:
        path: The file.
        tests: The folder of all tests.
    """
    return _PLACES.get(path.relative_to(tests).as_posix(), len(LONGEST)) if path.is_relative_to(tests) else len(LONGEST)
