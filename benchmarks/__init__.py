"""What is measured here, with the command, the hardware and the date of each run: see README.md."""
