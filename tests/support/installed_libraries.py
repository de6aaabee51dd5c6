"""Which engine libraries a machine has, for tests: doubles of them, and a note of what was imported."""

from __future__ import annotations

import pytest

from dvdquant.backends import Backend
from dvdquant.deploy.sessions import engine_choice, engines
from dvdquant.errors import EngineError
from tests.support.engine_double import BF16, Library

__all__ = ["Machine"]


class Machine:
    """What is installed, and what of it was imported.

    Args:
        patch: What puts it in the place of the real libraries.
        full: The release of TensorRT; None if it is missing.
        lean: That of the lean runtime.
    """

    def __init__(self, patch: pytest.MonkeyPatch, full: str | None, lean: str | None) -> None:
        double = lambda inputs, name: inputs["hidden_states"]  # noqa: E731
        self.libraries = {
            name: Library(BF16, double, name=name, version=version)  # type: ignore[arg-type]
            for name, version in (("tensorrt", full), ("tensorrt_lean", lean))
            if version is not None
        }
        self.libraries["tensorrt_rtx"] = Library(BF16, double)
        self.imported: list[str] = []
        patch.setattr(engine_choice, "load_backend", self._load)
        for module in (engine_choice, engines):
            patch.setattr(module, "device_sm", lambda device: "8.7")

    def _load(self, name: str) -> Backend:
        self.imported.append(name)
        if name not in self.libraries:
            raise EngineError(f"{name} cannot be imported: No module named {name!r}", fix="install it")
        return self.libraries[name].backend

    @property
    def deserialized(self) -> dict[str, int]:
        """The number of engines that each library was given."""
        counts = {name: len(library.deserialized) for name, library in self.libraries.items()}
        return {name: count for name, count in counts.items() if count}
