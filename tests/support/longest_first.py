"""Test processes that share the work take the dearest files first, so that none is left alone with one at the end."""

from __future__ import annotations

from pathlib import Path

__all__ = ["LONGEST", "longest_first"]

# Below tests/, by processor seconds (``--cpu-seconds 40`` lists them anew); the order of all others does not matter.
LONGEST = (
    "export/graph/test_onnx_graphs.py",
    "deploy/generation/test_image_pipelines.py",
    "cli/test_command_lines.py",
    "deploy/serve/test_serve.py",
    "export/engines/test_builders.py",
    "export/test_pipeline_again.py",
    "cli/test_run_cli.py",
    "kernels/test_gpu_check.py",
    "quantize/test_quantize.py",
    "artifact/test_write_faults.py",
    "deploy/sessions/test_sessions.py",
    "test_tutorial.py",
    "export/test_pipeline.py",
    "artifact/test_kill_and_full_disk.py",
    "test_docs.py",
    "ops/test_cuda_binding.py",
    "export/passes/test_fp8_attention.py",
    "deploy/pipelines/test_transformer_dropin.py",
    "quantize/test_bgr.py",
    "system/test_memory.py",
    "deploy/sessions/test_lora_inputs.py",
    "deploy/sessions/test_fusion.py",
    "test_repository.py",
    "export/test_device_build.py",
    "benchmarks/test_quality_simulate.py",
    "quantize/test_magnitudes.py",
    "deploy/pipelines/test_transformer_requests.py",
    "quantize/test_jit.py",
    "deploy/planning/test_planner.py",
    "deploy/sessions/test_guidance_process.py",
    "cli/test_cli_help.py",
    "kernels/test_kernels_emulated.py",
    "export/verify/test_verify_layers.py",
    "export/test_export_formats.py",
    "checkpoint/test_gguf.py",
    "checkpoint/test_untrusted.py",
    "export/verify/test_verify_stored.py",
    "deploy/pipelines/test_pipelines.py",
    "deploy/sessions/test_compiled.py",
    "cli/test_bad_input.py",
    "artifact/test_transaction_faults.py",
    "model/test_configs.py",
    "deploy/report/test_report.py",
    "deploy/report/test_report_text.py",
)
_PLACES = {name: place for place, name in enumerate(LONGEST)}


def longest_first(path: Path, tests: Path) -> int:
    """Return the place of a test file in the order; those that are not named stay behind, as they were.

    Args:
        path: The file.
        tests: The folder of all tests.
    """
    return _PLACES.get(path.relative_to(tests).as_posix(), len(LONGEST)) if path.is_relative_to(tests) else len(LONGEST)
