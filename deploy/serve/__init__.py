"""The server: jobs in a store, workers that pull them, and the HTTP interface in front.

``server`` starts all of it. ``ray_app`` starts it on Ray and ``triton_models`` runs in Triton: both stay here, because commands
and files of users name them.
"""
