"""From a checkpoint to packed weights."""
