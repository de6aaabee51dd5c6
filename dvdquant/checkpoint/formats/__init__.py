"""What users hold besides diffusers folders: other names, other precisions, other containers.

Each module knows one: how it is recognised, and how its tensors become those of diffusers. :mod:`.translate` puts them in
their order; :mod:`.files` finds the files in a folder.
"""
