"""Quality of every method on a toy model: ``python -m benchmarks.quality`` lists the commands."""
