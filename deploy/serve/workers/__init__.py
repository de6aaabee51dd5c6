"""The workers that draw, in processes of their own, and the server's side of them."""
