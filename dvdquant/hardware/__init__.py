"""The GPUs that people have: what they are called, what they execute, and which recipe suits them."""
