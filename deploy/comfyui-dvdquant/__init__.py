"""ComfyUI nodes of dvdquant. The code is in the package: ``dvdquant.deploy.comfyui``."""

try:
    from dvdquant.deploy.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "dvdquant":
        raise
    raise ImportError(
        "comfyui-dvdquant needs the package dvdquant in ComfyUI's Python, in a version that has the nodes. "
        "Install it there from its repository: python -m pip install PATH_OF_DVDQUANT"
    ) from error

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
