"""What pyproject.toml cannot say: a wheel takes the built CUDA kernels along, and belongs to a platform then."""

import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# The processor that `make kernels HOST=…` compiled for; this machine's where it is not given.
HOST = os.environ.get("DVDQUANT_HOST", "")
LIBRARY = Path(__file__).parent / "build" / (f"kernels-{HOST}" if HOST else "kernels") / "libdvdquant_kernels.so"


class BuildWithKernels(build_py):
    """Put the library of ``make kernels``, where it was built, beside the sources it was built from."""

    def run(self) -> None:
        """Copy the packages, and the library if it was built."""
        super().run()
        if LIBRARY.is_file() and not self.editable_mode:
            place = Path(self.build_lib) / "dvdquant" / "_native" / LIBRARY.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(LIBRARY, place)


class WheelWithKernels(bdist_wheel):
    """Name the platform of a wheel with the library, for any Python 3; without it the wheel is for all machines."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, ABI and platform of the wheel's name."""
        if not LIBRARY.is_file():
            return super().get_tag()
        platform = f"linux_{HOST}" if HOST else sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels})
