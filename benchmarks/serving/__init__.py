"""The server under load: what it costs, what a kill costs, whether it grows."""
