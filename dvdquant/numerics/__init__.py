"""The numbers of the method: Hadamard rotation, activation grids, packed codes."""
