"""What the exporter and the runtime both need of ONNX."""
