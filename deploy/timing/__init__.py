"""How long the engines of an export take on this machine."""
