"""The clips tiny-wan is trained on, and what a clip shows, measured from its pixels.

A clip is RGB in [−1, 1], [3, F, H, W]: a coloured shape whose centre moves along one axis at 1 to 1.5 pixels a frame on a
plain background. :func:`draw` makes one; :func:`measure` reads shape, colour, motion, size and background back without a
reference, which is how generated clips are scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CHOICES", "Clip", "Reading", "draw", "measure", "random_clip"]

CHOICES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "ring"),
    "colour": ("red", "green", "blue", "yellow"),
    "motion": ("right", "left", "down", "up"),
    "size": ("small", "large"),
    "background": ("black", "grey"),
}
COLOURS = {"red": (1, -0.7, -0.7), "green": (-0.7, 0.9, -0.6), "blue": (-0.6, -0.4, 1), "yellow": (1, 0.9, -0.8)}
BACKGROUNDS = {"black": -1.0, "grey": 0.0}
RADII = {"small": 4.0, "large": 6.5}
# Direction of the centre as (down, right).
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
FRAMES, SIDE = 8, 24


@dataclass(frozen=True)
class Clip:
    """Describes one clip.

    Args:
        words: Shape, colour, motion, size and background.
        start: The centre in the first frame (row, column), in pixels.
        speed: Pixels a frame.
    """

    words: tuple[str, str, str, str, str]
    start: tuple[float, float]
    speed: float


@dataclass(frozen=True)
class Reading:
    """Says what a clip shows.

    Args:
        words: The nearest word of each kind; None where nothing can be seen.
        speed: Pixels a frame along the direction of motion.
        visible: The share of frames that show a shape.
        smoothness: 1 − the root mean square of the centre's second difference, in pixels, at least 0.
        dynamic: The mean absolute difference of adjacent frames.
    """

    words: dict[str, str | None]
    speed: float
    visible: float
    smoothness: float
    dynamic: float


def random_clip(generator: torch.Generator) -> Clip:
    """Draw words, place and speed of a clip so that the whole shape stays inside.

    Args:
        generator: Draws them.
    """

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=generator))

    shape, colour, motion, size, background = (words[pick(len(words))] for words in CHOICES.values())
    radius, speed = RADII[size], uniform(1.0, 1.5)
    travel = speed * (FRAMES - 1)
    low, high = radius, SIDE - 1 - radius
    across = uniform(low, high)
    first = uniform(low, max(low, high - travel))
    along = first if sum(DIRECTIONS[motion]) > 0 else SIDE - 1 - first
    start = (along, across) if DIRECTIONS[motion][0] else (across, along)
    return Clip((shape, colour, motion, size, background), start, speed)


def coverage(shape: str, radius: float, row: float, column: float) -> Tensor:
    """Return how much of each pixel a shape covers, fp32 [SIDE, SIDE] in [0, 1]; edges are one pixel wide.

    Args:
        shape: Name of the shape.
        radius: Half its size, in pixels.
        row: Its centre, in pixels from the top.
        column: Its centre, in pixels from the left.
    """
    axis = torch.arange(SIDE, dtype=torch.float32)
    down, right = axis[:, None] - row, axis[None, :] - column
    if shape == "circle":
        distance = (down.square() + right.square()).sqrt() - radius
    elif shape == "ring":
        distance = ((down.square() + right.square()).sqrt() - 0.75 * radius).abs() - 0.25 * radius
    elif shape == "square":
        distance = torch.maximum(down.abs(), right.abs()) - 0.85 * radius
    else:  # an upright triangle
        sides = (2 * right.abs() - down - radius) / math.sqrt(5.0)
        distance = torch.maximum(sides, down - radius * 0.8)
    return (0.5 - distance).clamp(0, 1)


def draw(clip: Clip) -> Tensor:
    """Draw a clip, fp32 [3, FRAMES, SIDE, SIDE] in [−1, 1].

    Args:
        clip: Words, place and speed.
    """
    shape, colour, motion, size, background = clip.words
    down, right = DIRECTIONS[motion]
    frames = []
    for frame in range(FRAMES):
        row, column = clip.start[0] + down * clip.speed * frame, clip.start[1] + right * clip.speed * frame
        alpha = coverage(shape, RADII[size], row, column)
        rgb = torch.tensor(COLOURS[colour], dtype=torch.float32)[:, None, None]
        frames.append(alpha * rgb + (1 - alpha) * BACKGROUNDS[background])
    return torch.stack(frames, dim=1)


def measure(clip: Tensor) -> Reading:
    """Read from the pixels what a clip shows.

    Where nothing can be seen, a constant clip say, every word but the background is None. A clip that is not finite
    shows nothing at all: every word is None and every number 0.

    Args:
        clip: RGB in [−1, 1], floating point [3, F, SIDE, SIDE], F at least 2.

    Raises:
        ValueError: The clip has another shape.
    """
    if clip.ndim != 4 or clip.shape[0] != 3 or clip.shape[1] < 2 or clip.shape[2:] != (SIDE, SIDE):
        raise ValueError(f"a clip is [3, F, {SIDE}, {SIDE}] with F at least 2, this is {list(clip.shape)}")
    if not bool(clip.isfinite().all()):
        return Reading(dict.fromkeys(CHOICES), 0.0, 0.0, 0.0, 0.0)
    clip = clip.float().clamp(-1, 1)
    level = float(clip.mean(0).median())
    background = min(BACKGROUNDS, key=lambda name: abs(BACKGROUNDS[name] - level))
    ground = BACKGROUNDS[background]
    difference = clip - ground
    strength = difference.abs().mean(0)
    core = strength > 0.6 * strength.amax().clamp(min=1e-6)
    mean = clip[:, core].mean(1)
    colour = min(COLOURS, key=lambda name: float((mean - torch.tensor(COLOURS[name])).norm()))
    direction = torch.tensor(COLOURS[colour]) - ground
    alpha = (torch.einsum("cfhw,c->fhw", difference, direction) / direction.square().sum()).clamp(0, 1)
    # Noise over the whole frame would pull the centre to the middle.
    solid = ((alpha - 0.4) / 0.6).clamp(0, 1)
    mass = solid.sum((1, 2))
    # The largest shape covers a quarter of the frame; what covers more than half is no shape.
    seen = (mass > 8.0) & ((solid > 0).float().mean((1, 2)) < 0.5)
    visible = float(seen.float().mean())
    dynamic = float((clip[:, 1:] - clip[:, :-1]).abs().mean())
    if int(seen.sum()) < 3:
        nothing: dict[str, str | None] = dict.fromkeys(CHOICES)
        return Reading({**nothing, "background": background}, 0.0, visible, 0.0, dynamic)
    axis = torch.arange(SIDE, dtype=torch.float32)
    centres = torch.stack(((solid.sum(2) @ axis), (solid.sum(1) @ axis)), 1) / mass[:, None].clamp(min=1e-6)
    velocity = _slope(centres[seen], seen.nonzero()[:, 0].float())
    shape, size = _best_template(alpha[seen], centres[seen])
    motion, speed = _motion(velocity)
    bend = centres[2:] - 2 * centres[1:-1] + centres[:-2]
    whole = seen[2:] & seen[1:-1] & seen[:-2]
    rough = float(bend[whole].square().sum(1).mean().sqrt()) if bool(whole.any()) else 1.0
    words = {"shape": shape, "colour": colour, "motion": motion, "size": size, "background": background}
    return Reading(words, speed, visible, max(0.0, 1.0 - rough), dynamic)


def _slope(values: Tensor, times: Tensor) -> Tensor:
    """Return the least-squares slope of values [T, 2] over times [T]."""
    centred = times - times.mean()
    return (centred[:, None] * values).sum(0) / centred.square().sum()


def _motion(velocity: Tensor) -> tuple[str | None, float]:
    """Return the name of a motion, None where there is none, and its speed in pixels a frame."""
    down, right = float(velocity[0]), float(velocity[1])
    speed = max(abs(down), abs(right))
    if speed < 0.3:
        return None, speed
    if abs(right) >= abs(down):
        return ("right" if right > 0 else "left"), speed
    return ("down" if down > 0 else "up"), speed


def _best_template(alpha: Tensor, centres: Tensor) -> tuple[str, str]:
    """Return the shape and the size whose drawing differs least from what is seen, laid on the same centroids.

    Args:
        alpha: How much of each pixel the shape covers, fp32 [T, SIDE, SIDE] in [0, 1].
        centres: Its centroid (row, column) in each frame, fp32 [T, 2] in pixels.
    """
    axis = torch.arange(SIDE, dtype=torch.float32)
    middle = (SIDE - 1) / 2
    best, least = ("circle", "small"), math.inf
    for shape in CHOICES["shape"]:
        for size in CHOICES["size"]:
            plain = coverage(shape, RADII[size], middle, middle)
            shift = float(plain.sum(1) @ axis / plain.sum()) - middle
            error = 0.0
            for frame, centre in zip(alpha, centres):
                error += float(
                    (frame - coverage(shape, RADII[size], float(centre[0]) - shift, float(centre[1]))).square().sum()
                )
            if error < least:
                best, least = (shape, size), error
    return best
