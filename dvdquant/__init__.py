"""dvdquant: video diffusion transformers as TensorRT engines with 4-bit weights and 4- or 8-bit activations."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dvdquant")
except PackageNotFoundError:  # an uninstalled checkout
    __version__ = "0.1.0"

__all__ = ["__version__"]
