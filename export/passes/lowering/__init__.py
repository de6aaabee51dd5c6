"""The lowerings of QuantLinear to graphs that one builder runs: INT8, packed INT4, NVFP4."""
