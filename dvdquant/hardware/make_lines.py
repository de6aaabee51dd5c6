"""The lines of ``make`` that build our parts for a device."""

from __future__ import annotations

from collections.abc import Sequence

from dvdquant.hardware.capabilities import JETSONS, sm_number
from dvdquant.system.plugin_file import machine_name

__all__ = ["make_plugin", "make_wheel"]


def make_plugin(machine: str, sms: Sequence[str], here: str | None = None) -> str:
    """Return the line that builds the plugin library with its kernels, to be run in a checkout.

    Args:
        machine: The processor of the device, as ``uname -m`` says it.
        sms: The compute capabilities of its GPUs; where all are Jetsons', only their kernels are built.
        here: The processor of the machine that builds; None means this one.
    """
    crossed, where = _crossed(machine, here)
    few = f' SM="{" ".join(str(sm_number(sm)) for sm in sms)}"' if sms and all(sm in JETSONS for sm in sms) else ""
    root = " TENSORRT_ROOT=FOLDER" if crossed else ""
    return f"make kernels{crossed}{few} && make plugin{crossed}{root}{where}"


def make_wheel(machine: str) -> str:
    """Return the line that builds the wheel of dvdquant for a device, to be run in a checkout on this machine.

    Args:
        machine: The processor of the device, as ``uname -m`` says it.
    """
    crossed, where = _crossed(machine, None)
    return f"make wheel{crossed}{where}"


def _crossed(machine: str, here: str | None) -> tuple[str, str]:
    """Return the option for another processor than the builder's, and what is said where there is no such option."""
    if machine == (here or machine_name()):
        return "", ""
    return (" HOST=aarch64", "") if machine == "aarch64" else ("", f"  # on a machine with {machine}")
