"""Whether a whole pipeline fits devices of the sizes that are sold, by the arrangements of :mod:`.memory_plan`.

Where a pipeline is not at hand, its text encoder and VAE are those that the family is published with; their sizes are counted
from their configurations (``benchmarks/working_memory.py``). Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dvdquant.deploy.generation.memory_plan import (
    INT8_ROW,
    Loaded,
    MemoryPlan,
    RunBytes,
    best,
    four_bit_bytes,
    possible,
)
from dvdquant.hardware.shared_memory import seen_bytes
from dvdquant.model.families import Family, Sizes
from dvdquant.model.working_memory import decode_bytes, step_bytes_at, vae_name
from dvdquant.system.device_memory import usable_bytes
from dvdquant.text import amount

__all__ = ["DEVICES", "DeviceSize", "Fit", "fit", "published", "published_run"]

GIB = 1 << 30


@dataclass(frozen=True)
class DeviceSize:
    """A device as it is sold.

    Args:
        name: Its series.
        gib: The memory that it is sold with, in GiB.
        sms: The compute capabilities of the series.
        unified: Whether the system shares the memory.
    """

    name: str
    gib: int
    sms: tuple[str, ...]
    unified: bool = False

    @property
    def usable(self) -> int:
        """Return the bytes that a run may take, of what the system sees where it shares the memory."""
        total = seen_bytes(self.sms[0], self.gib) if self.unified else self.gib * GIB
        return usable_bytes(total, self.unified)

    def __str__(self) -> str:
        return f"{self.name} {self.gib} GB"


DEVICES = (
    *(DeviceSize("Orin", gib, ("8.7",), unified=True) for gib in (8, 16, 32, 64)),
    DeviceSize("Thor", 128, ("11.0",), unified=True),
    *(DeviceSize("RTX", gib, ("8.6", "8.9", "12.0")) for gib in (8, 12, 16, 24, 32)),
)


@dataclass(frozen=True)
class _Published:
    """The parts that a family is published with.

    Args:
        text: Parameters of its text encoders, and how many of them lie in linear layers.
        rows: Rows of these linear layers.
        vae: Bytes of its VAE as it is loaded.
        image: Bytes of the image encoder of its first image model, 0 where there is none.
        names: The text encoders, in words.
    """

    text: tuple[int, int]
    rows: int
    vae: int
    names: str
    image: int = 0


_T5_ROWS = 24 * (4 * 4096 + 2 * 10240 + 4096)
_PUBLISHED = {
    "wan": _Published((5_680_910_336, 4_630_511_616), _T5_ROWS, 4 * 126_892_531, "UMT5-XXL", 2 * 630_766_080),
    "wan-48": _Published((5_680_910_336, 4_630_511_616), _T5_ROWS, 4 * 704_688_668, "UMT5-XXL"),
    "hunyuan-video": _Published(
        (7_505_186_816 + 123_060_480, 6_979_321_856 + 84_934_656),
        32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096) + 12 * (4 * 768 + 3072 + 768),
        2 * 246_478_803,
        "Llama-3-8B and CLIP-L",
    ),
    "cogvideox": _Published((4_762_310_656, 4_630_511_616), _T5_ROWS, 2 * 215_583_907, "T5-XXL"),
    "ltx-video": _Published((4_762_310_656, 4_630_511_616), _T5_ROWS, 2 * 419_193_649, "T5-XXL"),
}


def published_run(family: Family, sizes: Sizes, transformer: Mapping[Loaded, int]) -> RunBytes:
    """Return the bytes of a run with the parts that a family is published with, at the size an export is tuned for.

    Args:
        family: The family of the transformer.
        sizes: The sizes of the export.
        transformer: Bytes of what may be loaded of the transformers, the one with most choice first.
    """
    parts = published(family)
    total, linear = parts.text
    latent = sizes.at("opt")
    time, down, across = family.vae_scale
    frames, height, width = (latent[0] - 1) * time + 1, latent[1] * down, latent[2] * across
    return RunBytes(
        text={
            16: 2 * total,
            8: 2 * (total - linear) + linear + INT8_ROW * parts.rows,
            4: 2 * (total - linear) + four_bit_bytes(linear, parts.rows),  # all of these layers have whole groups
        },
        image=parts.image if family.images().first == "required" else 0,
        vae=parts.vae,
        transformer=transformer,
        step=step_bytes_at(family, sizes, latent),
        decode={tiled: decode_bytes(family, frames, height, width, tiled=tiled) for tiled in (False, True)},
    )


def published(family: Family) -> _Published:
    """Return the parts that a family is published with.

    Args:
        family: The family of the transformer.
    """
    return _PUBLISHED[vae_name(family)]


@dataclass(frozen=True)
class Fit:
    """The fit of a run to a device: whether it has room, and how.

    Args:
        device: The device.
        plan: The arrangement that costs least of those that fit; or the smallest one where none does.
        fits: Whether it fits.
    """

    device: DeviceSize
    plan: MemoryPlan
    fits: bool

    def words(self, first: Loaded) -> str:
        """Return the answer in words.

        Args:
            first: What of the transformers needs no word.
        """
        how = self.plan.arrangement.words(first)
        if self.fits:
            return f"fits{f': {how}' if how else ''} ({amount(self.plan.peak)})"
        return f"no: {amount(self.plan.peak)} at least, while {self.plan.worst.name}"


def fit(run: RunBytes, devices: Sequence[DeviceSize]) -> list[Fit]:
    """Return for every device whether a run fits, and how.

    Args:
        run: The bytes of the run.
        devices: The devices.
    """
    return [Fit(device, *best(possible(run, unified=device.unified), device.usable)) for device in devices]
