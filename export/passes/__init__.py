"""The graph passes, one per file: each edits an ``onnx_ir.Model`` in place and returns whether it changed something."""
