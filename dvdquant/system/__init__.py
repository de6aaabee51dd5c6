"""What is not about models: files, safetensors, memory, progress, text."""
