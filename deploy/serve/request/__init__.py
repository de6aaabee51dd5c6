"""What a client asks for: its fields and pictures, whether a model can draw it, and errors in its words."""
