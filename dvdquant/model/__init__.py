"""Models: their families, the plan of the layers, quantized layers."""
