"""The server: jobs in a store, workers that pull them, and the HTTP interface in front."""
