"""The ComfyUI nodes: an export as a MODEL that ComfyUI's own samplers run.

The folder ``comfyui-dvdquant`` is what ComfyUI's manager installs; it holds no code of its own. Modules here import
ComfyUI (``comfy``, ``folder_paths``) inside of functions, so that nodes and conversions can be tested without it;
:mod:`.model` alone needs it at import.
"""
