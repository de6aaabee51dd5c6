"""The drop-in transformer for diffusers pipelines."""
