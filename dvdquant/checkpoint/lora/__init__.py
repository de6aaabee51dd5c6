"""LoRA files: which layers they change, and the change added to the weights while a checkpoint is read."""
