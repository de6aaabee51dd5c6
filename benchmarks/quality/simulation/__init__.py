"""Quantized layers in simulation, and the model in which they are exchanged."""
