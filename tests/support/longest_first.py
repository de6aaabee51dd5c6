"""Test processes that share the work take the dearest files first, so that none is left alone with one at the end."""

from __future__ import annotations

from pathlib import Path

__all__ = ["LONGEST", "longest_first"]

# Below tests/, by processor seconds (``--cpu-seconds 40`` lists them anew); the order of all others does not matter.
LONGEST = (
    "deploy/test_serve.py",
    "cli/test_command_lines.py",
    "cli/test_run_cli.py",
    "deploy/test_image_pipelines.py",
    "export/test_onnx_graphs.py",
    "quantize/test_quantize.py",
    "export/test_device_build.py",
    "export/test_pipeline_again.py",
    "export/test_verify_layers.py",
    "deploy/test_sessions.py",
    "export/test_pipeline.py",
    "kernels/test_gpu_check.py",
    "deploy/test_fusion.py",
    "deploy/test_transformer_dropin.py",
    "export/test_builders.py",
    "artifact/test_kill_and_full_disk.py",
    "artifact/test_write_faults.py",
    "test_tutorial.py",
    "export/test_fp8_attention.py",
    "model/test_configs.py",
    "artifact/test_transaction_faults.py",
    "test_docs.py",
    "test_repository.py",
    "ops/test_cuda_binding.py",
    "kernels/test_kernels_emulated.py",
    "quantize/test_magnitudes.py",
    "benchmarks/test_quality_simulate.py",
    "deploy/test_pipelines.py",
    "export/test_verify_stored.py",
    "deploy/test_guidance_process.py",
    "model/test_families.py",
    "system/test_memory.py",
    "deploy/test_session_attention.py",
    "quantize/test_bgr.py",
    "deploy/test_cancel.py",
    "checkpoint/test_formats.py",
    "deploy/test_session_copies.py",
    "export/test_export_formats.py",
    "deploy/test_guidance_pair.py",
)
_PLACES = {name: place for place, name in enumerate(LONGEST)}


def longest_first(path: Path, tests: Path) -> int:
    """Return the place of a test file in the order; those that are not named stay behind, as they were.

    Args:
        path: The file.
        tests: The folder of all tests.
    """
    return _PLACES.get(path.relative_to(tests).as_posix(), len(LONGEST)) if path.is_relative_to(tests) else len(LONGEST)
