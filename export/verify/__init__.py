"""The checks of ``--verify``: graphs and stored weights against PyTorch in float64 and the checkpoint."""
