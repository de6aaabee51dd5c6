"""Which GPUs a library has code for, by the architectures that it was compiled for."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["serves"]

# Orin and Thor: what is compiled for other GPUs of their major version does not run on them.
TEGRA = (87, 110)


def serves(architectures: Sequence[str], sm: int) -> bool:
    """Return whether a library that is built for ``architectures`` holds code for a GPU.

    Machine code runs on its own major version from its own minor version on, but the Tegra chips (:data:`TEGRA`) run theirs
    alone, and it runs on no other. PTX (``compute_80``) is compiled by the driver for any GPU since, except 9.0: the paths
    that are planned there have instructions of their own.

    Args:
        architectures: What ``dvdq_architectures`` says, such as ``("80", "90a", "compute_80")``.
        sm: major · 10 + minor of the GPU.
    """
    numbers = [int(name.rstrip("af")) for name in architectures if name.rstrip("af").isdigit()]
    if sm in numbers:
        return True
    earlier = [number for number in numbers if number // 10 == sm // 10 and number < sm and number not in TEGRA]
    if earlier and sm not in TEGRA:
        return True
    ptx = [name.removeprefix("compute_") for name in architectures if name.startswith("compute_")]
    return sm != 90 and any(number.isdigit() and int(number) <= sm for number in ptx)
