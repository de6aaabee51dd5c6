"""The part of torch.nn.Module that moves, casts, loads and trains: engines stay as they were opened."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Self

import torch

from dvdquant.deploy.pipelines.unsupported import LOADED, refuse
from dvdquant.deploy.sessions import EngineSession
from dvdquant.system.torch_hooks import parse_to

__all__ = ["FixedPlace"]

log = logging.getLogger(__name__)


class FixedPlace:
    """The part of a transformer that keeps device, dtype, weights and mode.

    Attributes:
        _session: The session that runs the engines.
        _moved: Whether it was said that the engines stay where they are.
    """

    _session: EngineSession
    _moved: bool

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the export."""
        return self._session.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the engines."""
        return self._session.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Accept the engines' own device and dtype, and the CPU, but leave the engines where they were opened.

        Offloading moves everything to the CPU, so that device is accepted.

        Args:
            *args: The arguments of ``torch.nn.Module.to``.
            **kwargs: The keyword arguments of ``torch.nn.Module.to``.

        Raises:
            UnsupportedError: The device is another accelerator, or the dtype is not the export's.
        """
        device, dtype = parse_to(*args, **kwargs)
        if dtype not in (None, self.dtype):
            refuse(f".to({dtype})", "its dtype is that of the export", "export again with --dtype", str(self.dtype))
        if device is not None and not _same_device(device, self.device):
            if device.type != "cpu":
                refuse(
                    f".to({str(device)!r})",
                    f"its engines were opened on {self.device}",
                    f"open it there: DvdqTransformer.from_pretrained(OUT, device={str(device)!r})",
                    str(self.device),
                )
            if not self._moved:
                log.info(
                    "the engines of %s stay on %s; close() gives their memory back",
                    self._session.component,
                    self.device,
                )
                self._moved = True
        return self

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Accept the engines' own CUDA device, see :meth:`to`.

        Args:
            device: A CUDA device or its index. The default is ``cuda``.
        """
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def cpu(self) -> Self:
        """Accept the CPU but leave the engines where they are, see :meth:`to`."""
        return self.to("cpu")

    def half(self, *args: Any) -> Self:
        """Accept float16 if it is the export's dtype, see :meth:`to`.

        Args:
            *args: As for the method of :class:`torch.nn.Module`.
        """
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """Accept bfloat16 if it is the export's dtype, see :meth:`to`."""
        return self.to(torch.bfloat16)

    def float(self, *args: Any) -> Self:
        """Refuse float32, which is no export's dtype, see :meth:`to`.

        Args:
            *args: As for the method of :class:`torch.nn.Module`.
        """
        return self.to(torch.float32)

    def double(self) -> Self:
        """Refuse float64, which is no export's dtype, see :meth:`to`."""
        return self.to(torch.float64)

    def type(self, dst_type: Any) -> Self:
        """Accept a dtype if it is the export's, see :meth:`to`.

        Args:
            dst_type: The dtype.
        """
        return self.to(dst_type)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Accept only this module's own state, which holds no weights.

        Args:
            state_dict: The state of this module.
            *args: Further arguments of ``torch.nn.Module.load_state_dict``.
            **kwargs: Further keyword arguments of ``torch.nn.Module.load_state_dict``.

        Raises:
            UnsupportedError: The state is another one.
        """
        if set(state_dict) != {"placement"}:
            refuse("load_state_dict", *LOADED)
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Self:
        """Refuse the training mode.

        Args:
            mode: True for the training mode, False for the evaluation mode.

        Raises:
            UnsupportedError: ``mode`` is True.
        """
        if mode:
            refuse("training", "an engine has no gradients", "train the original checkpoint and export it again")
        super().train(False)  # type: ignore[misc]
        return self


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))
