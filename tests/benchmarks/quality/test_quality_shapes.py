"""benchmarks/quality: what is drawn is read back, broken clips have a defined reading, and training sees matching pairs."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.quality_scripts import script

WRONG = {  # another word of each kind
    "shape": {"circle": "square", "square": "triangle", "triangle": "ring", "ring": "circle"},
    "colour": {"red": "yellow", "yellow": "green", "green": "blue", "blue": "red"},
    "motion": {"right": "left", "left": "down", "down": "up", "up": "right"},
    "size": {"small": "large", "large": "small"},
    "background": {"black": "grey", "grey": "black"},
}
OPPOSITE = {"right": "left", "left": "right", "up": "down", "down": "up"}
# Pixels a frame. The centre of a drawn shape is off by at most half an edge pixel at each end of seven steps; measured
# over all prompts: 0.038, and 0.043 with noise.
SPEED_TOLERANCE = 0.1


@pytest.fixture(scope="module")
def shapes() -> ModuleType:
    return script("shapes")


def _clips(shapes: ModuleType, seed: int) -> list[Any]:
    """A clip of each of the 256 prompts, place and speed as random_clip draws them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for words in itertools.product(*shapes.CHOICES.values()):
        radius = shapes.RADII[words[3]]
        a, b, c = torch.rand(3, generator=generator).tolist()
        speed, low, high = 1.0 + 0.5 * a, radius, shapes.SIDE - 1 - radius
        travel = speed * (shapes.FRAMES - 1)
        across = low + (high - low) * b
        along = low + (max(low, high - travel) - low) * c
        down, right = shapes.DIRECTIONS[words[2]]
        along = along if down + right > 0 else shapes.SIDE - 1 - along
        found.append(shapes.Clip(words, (along, across) if down else (across, along), speed))
    return found


def _named(clip: Any, shapes: ModuleType) -> dict[str, str]:
    return dict(zip(shapes.CHOICES, clip.words))


# --------------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.stress)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_every_prompt_is_read_back(shapes: ModuleType, noise: float, every: int) -> None:
    """Each fifth of the 256 prompts, which has every word in it; all of them under stress."""
    generator = torch.Generator().manual_seed(7)
    clips = _clips(shapes, seed=int(10 * noise))
    assert len({clip.words for clip in clips}) == 256
    some = clips[::every]
    assert all({clip.words[i] for clip in some} == set(words) for i, words in enumerate(shapes.CHOICES.values()))
    for clip in some:
        pixels = shapes.draw(clip)
        reading = shapes.measure(pixels + noise * torch.randn(pixels.shape, generator=generator))
        assert reading.words == _named(clip, shapes)
        assert reading.speed == pytest.approx(clip.speed, abs=SPEED_TOLERANCE), clip
        assert reading.visible == 1
        assert 0 < reading.smoothness <= 1


def test_drawing_has_its_pixels_where_they_belong(shapes: ModuleType) -> None:
    clip = shapes.Clip(("square", "red", "right", "small", "black"), (12.0, 6.0), 1.0)
    pixels = shapes.draw(clip)
    assert pixels.shape == (3, shapes.FRAMES, shapes.SIDE, shapes.SIDE)
    for frame in range(shapes.FRAMES):
        assert pixels[:, frame, 12, 6 + frame].tolist() == pytest.approx(list(shapes.COLOURS["red"]))
        assert pixels[:, frame, 12, 6 + frame - 5].tolist() == [-1, -1, -1]
        assert pixels[:, frame, 17, 6 + frame].tolist() == [-1, -1, -1]
        # Edge to edge 2 · 0.85 · 4 pixels; the pixels between it and the ground share one pixel's width.
        covered = (pixels[0, frame, 12] + 1) / 2
        assert float(covered.sum()) == pytest.approx(2 * 0.85 * 4, abs=1e-5)


@pytest.mark.parametrize("kind", list(WRONG))
def test_a_wrong_word_is_detected(shapes: ModuleType, kind: str) -> None:
    """Drawn with one other word, every ninth prompt: that word is read, not the one asked for, and the rest stays."""
    index = list(shapes.CHOICES).index(kind)
    for clip in _clips(shapes, seed=3)[::9]:
        asked = _named(clip, shapes)
        words = list(clip.words)
        words[index] = WRONG[kind][words[index]]
        # From the middle, so that the other words leave the whole shape inside.
        drawn = shapes.Clip(tuple(words), (11.5, 11.5), 0.5)
        reading = shapes.measure(shapes.draw(drawn))
        assert {name for name in asked if reading.words[name] != asked[name]} == {kind}
        assert reading.words[kind] == words[index]


def test_random_clips_stay_inside_and_are_read_back(shapes: ModuleType) -> None:
    generator = torch.Generator().manual_seed(11)
    for _ in range(30):
        clip = shapes.random_clip(generator)
        down, right = shapes.DIRECTIONS[clip.words[2]]
        for frame in (0, shapes.FRAMES - 1):
            for start, direction in zip(clip.start, (down, right)):
                place, radius = start + direction * clip.speed * frame, shapes.RADII[clip.words[3]]
                # The fastest large shape travels half a pixel more than there is room.
                assert radius - 0.51 <= place <= shapes.SIDE - 1 - radius + 0.51
        assert 1 <= clip.speed <= 1.5
        assert shapes.measure(shapes.draw(clip)).words == _named(clip, shapes)


# ---------------------------------------------------------------------------------------------------------- how it moves


def test_played_backwards_it_moves_the_other_way(shapes: ModuleType) -> None:
    for clip in _clips(shapes, seed=4)[::13]:
        pixels = shapes.draw(clip)
        forward, backward = shapes.measure(pixels), shapes.measure(pixels.flip(1))
        assert backward.words == {**forward.words, "motion": OPPOSITE[clip.words[2]]}
        assert backward.speed == pytest.approx(forward.speed, abs=1e-4)
        assert backward.smoothness == pytest.approx(forward.smoothness, abs=1e-4)
        assert backward.dynamic == pytest.approx(forward.dynamic, rel=1e-5)


def test_a_shape_that_stops_half_way_is_less_smooth(shapes: ModuleType) -> None:
    for clip in _clips(shapes, seed=5)[::13]:
        pixels = shapes.draw(clip)
        stopped = torch.cat((pixels[:, :4], pixels[:, 3:4].expand(-1, 4, -1, -1)), dim=1)
        whole, half = shapes.measure(pixels), shapes.measure(stopped)
        assert half.smoothness < whole.smoothness - 0.05, clip
        assert half.dynamic < whole.dynamic
        assert half.speed < whole.speed
    ideal = shapes.Clip(("circle", "red", "right", "large", "black"), (11.0, 7.0), 1.0)
    # Whole pixels: nothing is rounded, and the one change of speed, 1 pixel among 6 second differences, is √(1/6).
    pixels = shapes.draw(ideal)
    assert shapes.measure(pixels).smoothness == pytest.approx(1, abs=1e-5)
    stopped = torch.cat((pixels[:, :4], pixels[:, 3:4].expand(-1, 4, -1, -1)), dim=1)
    assert shapes.measure(stopped).smoothness == pytest.approx(1 - math.sqrt(1 / 6), abs=1e-4)


def test_a_shape_that_stands_still_has_no_motion(shapes: ModuleType) -> None:
    pixels = shapes.draw(shapes.Clip(("ring", "blue", "up", "large", "grey"), (12.0, 12.0), 0.0))
    reading = shapes.measure(pixels)
    assert reading.words == {"shape": "ring", "colour": "blue", "motion": None, "size": "large", "background": "grey"}
    assert (reading.speed, reading.dynamic) == (pytest.approx(0, abs=1e-6), 0)


def test_a_shape_that_vanishes_is_seen_in_part(shapes: ModuleType) -> None:
    pixels = shapes.draw(shapes.Clip(("circle", "green", "down", "large", "black"), (7.0, 12.0), 1.2))
    pixels[:, 5:] = -1
    reading = shapes.measure(pixels)
    assert reading.visible == pytest.approx(5 / 8)
    assert reading.words["motion"] == "down"


# ---------------------------------------------------------------------------------------------------------- broken clips


@pytest.mark.parametrize(
    ("level", "background"), [(-1, "black"), (0, "grey"), (-0.2, "grey"), (0.3, "grey"), (1, "grey")]
)
def test_a_constant_clip_shows_nothing(shapes: ModuleType, level: float, background: str) -> None:
    reading = shapes.measure(torch.full((3, 8, 24, 24), float(level)))
    nothing = dict.fromkeys(shapes.CHOICES)
    assert reading == shapes.Reading({**nothing, "background": background}, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whole", [True, False])
def test_a_clip_that_is_not_finite_shows_nothing(shapes: ModuleType, value: float, whole: bool) -> None:
    pixels = shapes.draw(shapes.Clip(("ring", "blue", "up", "large", "grey"), (16.0, 12.0), 1.0))
    if whole:
        pixels[:] = value
    else:
        pixels[1, 3, 2, 5] = value
    assert shapes.measure(pixels) == shapes.Reading(dict.fromkeys(shapes.CHOICES), 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("shape", [(3, 0, 24, 24), (3, 1, 24, 24), (8, 24, 24), (1, 8, 24, 24), (3, 8, 24, 16)])
def test_another_shape_is_refused(shapes: ModuleType, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"F at least 2, this is \["):
        shapes.measure(torch.zeros(shape))


# -------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return script("train")


def test_batch_is_opposite_pairs_that_read_as_they_say(shapes: ModuleType, train: ModuleType) -> None:
    clips, words = train.batch(12, torch.Generator().manual_seed(2))
    assert clips.shape == (24, 3, shapes.FRAMES, shapes.SIDE, shapes.SIDE)
    assert len(words) == 24
    for pixels, clip in zip(clips, words):
        assert shapes.measure(pixels).words == _named(clip, shapes)
    for first, second, a, b in zip(clips[::2], clips[1::2], words[::2], words[1::2]):
        torch.testing.assert_close(second, first.flip(1), rtol=0, atol=0)
        there, back = _named(a, shapes), _named(b, shapes)
        assert back == {**there, "motion": OPPOSITE[there["motion"]]}
        assert not torch.equal(first, second)
    assert len({clip.words for clip in words}) > 12, "pairs differ from each other"
    again, _ = train.batch(12, torch.Generator().manual_seed(2))
    assert torch.equal(again, clips)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_sigmas_have_the_density_of_the_shifted_scheduler(train: ModuleType, shift: float) -> None:
    """σ = s u / (1 + (s − 1) u) of a uniform u: P(σ ≤ x) = x / (s − (s − 1) x)."""
    count = 20_000
    drawn: Tensor = train.sigmas(count, shift, torch.Generator().manual_seed(5)).double().sort().values
    assert drawn.shape == (count,)
    assert float(drawn[0]) > 0
    assert float(drawn[-1]) <= 1
    expected = drawn / (shift - (shift - 1) * drawn)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = max(float((expected - steps[:-1]).abs().max()), float((expected - steps[1:]).abs().max()))
    # Kolmogorov and Smirnov's distance at one in a thousand; another shift is ten times farther away.
    assert distance < 1.95 / math.sqrt(count)
    assert float((drawn > 0.5).double().mean()) == pytest.approx(shift / (shift + 1), abs=0.015)
