"""Engine builders: TensorRT and TensorRT-RTX through one code path, each build in a process of its own."""

from dvdquant.backends import RTX, TENSORRT, Backend, load_backend
from dvdquant.export.engines.engine import build_engine
from dvdquant.export.engines.report import BUILD_MEMORY_FACTOR, BuildReport

__all__ = ["BUILD_MEMORY_FACTOR", "RTX", "TENSORRT", "Backend", "BuildReport", "build_engine", "load_backend"]
