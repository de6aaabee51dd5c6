"""ONNX helpers that both the exporter and the runtime need."""
