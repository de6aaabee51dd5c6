"""How ONNX Runtime runs our graphs, in a session and in a check alike."""

from __future__ import annotations

from typing import Any

__all__ = ["runtime_options"]


def runtime_options(threads: int) -> Any:
    """Return an ``onnxruntime.SessionOptions`` that keeps the roundings of our graphs, and memory small.

    Args:
        threads: The number of threads of an operator.
    """
    import onnxruntime  # imported here: who draws with engines or with PyTorch does not wait for it

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Fusions would drop the casts that round to bfloat16.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Several sessions, each with a pool of threads, run in turn: the pools that wait must not spin meanwhile.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # With an arena for each session, the scratch of all would be kept, though they never run at once.
    options.enable_cpu_mem_arena = False
    return options
