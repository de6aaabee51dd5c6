"""The ONNX graphs of an export."""
