"""Compute on which devices published pipelines fit, and how: ``python -m benchmarks.memory_table`` prints the table.

docs/memory.md holds it. The weights of a transformer are those of recipe w4a4 as the device holds them packed
(:mod:`dvdquant.model.held_weights`). Text encoder and VAE are those that the family is published with. Nothing is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.held_weights import plan_of
from dvdquant.deploy.generation.device_fit import DEVICES, DeviceSize, Fit, fit, published_run
from dvdquant.deploy.generation.memory_plan import PACKED
from dvdquant.hardware.capabilities import sm_number
from dvdquant.model.families import Axis, Sizes
from dvdquant.model.held_weights import held_weights
from dvdquant.text import amount


@dataclass(frozen=True)
class Case:
    """A published model at a size.

    Args:
        name: Its name.
        config: The name of a file in ``configs``.
        size: Frames, height and width in pixels.
        text: Text tokens.
    """

    name: str
    config: str
    size: tuple[int, int, int]
    text: int


CASES = (
    Case("Wan2.1-1.3B", "wan2.1-1.3b", (81, 480, 832), 512),
    Case("Wan2.2-TI2V-5B", "wan2.2-5b", (121, 704, 1280), 512),
    Case("LTX-Video-2B", "ltx-video-2b", (121, 512, 768), 128),
    Case("CogVideoX-5B", "cogvideox-5b", (49, 480, 720), 226),
    Case("HunyuanVideo-13B", "hunyuan-video", (61, 544, 960), 256),
    Case("Wan2.1-14B", "wan2.1-14b", (81, 480, 832), 512),
)


def fits(case: Case, devices: tuple[DeviceSize, ...] = DEVICES) -> list[Fit]:
    """Return for every device whether a published model fits, and how.

    Args:
        case: The model.
        devices: The devices.
    """
    plan = plan_of(case.config, "w4a4")
    family = plan.family
    frames, height, width = case.size
    _, down, across = family.vae_scale
    latent = Axis.fixed(family.latent_frames(frames)), Axis.fixed(height // down), Axis.fixed(width // across)
    sizes = Sizes(*latent, case.text)
    found = []
    for device in devices:
        held = held_weights(plan, sm_number(device.sms[-1]), (4, 8), sizes).nbytes("packed")
        found += fit(published_run(family, sizes, {PACKED: held}), [device])
    return found


def words(found: Fit) -> str:
    """Return the cell of a table.

    Args:
        found: Whether a model fits a device.
    """
    how = found.plan.arrangement
    named = [
        str(how.transformer) if how.transformer != PACKED else "",
        "tiles" if how.vae_tiling else "",
        "offload" if how.offload else "",
        "text first" if how.alternate else "",
        {16: "", 8: "text int8", 4: "text 4 bits"}[how.text_bits],
    ]
    short = ", ".join(word for word in named if word)
    return f"{short or 'yes'} ({amount(found.plan.peak)})" if found.fits else f"**no** ({amount(found.plan.peak)})"


def table() -> str:
    """Return the table in Markdown: a row for every device, a column for every model."""
    columns = {case.name: fits(case) for case in CASES}
    names = [f"{case.name}, {case.size[0]} frames of {case.size[1]} × {case.size[2]}" for case in CASES]
    lines = ["| | " + " | ".join(names) + " |", "| --- " * (len(CASES) + 1) + "|"]
    for index, device in enumerate(DEVICES):
        lines.append(f"| {device} | " + " | ".join(words(each[index]) for each in columns.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
