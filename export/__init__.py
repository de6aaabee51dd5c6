"""Export of a quantized model: graphs, engines and their verification."""
