"""A model on its way: families, the plan of its layers, quantized layers."""
