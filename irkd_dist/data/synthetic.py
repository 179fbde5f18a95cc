"""Images that the package draws itself: textured shapes on cluttered backgrounds, with the true object mask.

The class is the outline and the texture that goes with it. Hue, place, size, tilt and the texture's direction are
drawn at random; the object is light on a darker background that carries texture of its own, strokes and scraps.
That is what a small ViT learns in minutes: with outline alone and free contrast it stayed near chance. An image is
a function of (seed, split, index) and can be drawn at any size.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from irkd_dist.data.sampler import uniform

CLASSES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "heart", "hourglass", "arrow")

_SUPER = 4  # drawn this many times larger in each direction, then averaged: smooth edges
_SPLITS = ("train", "val", "test")
_DRAWS = 256  # random numbers set aside for one image

Polygon = list[tuple[float, float]]  # corners in units of the shape's radius


def draw(seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Draw one image.

    Returns image (size, size, 3) uint8, mask (size, size) uint8 with 255 on the object, and the label.
    """
    label = index % len(CLASSES)
    u = _Draws(uniform(seed, index, np.arange(_DRAWS), 1000 + _SPLITS.index(split)))
    large = size * _SUPER
    colour, other = _colours(u)
    pixels = _background(u, large, other)
    _clutter(u, pixels, colour, other)
    shape = _shape(u, label, large)
    pixels = np.where(shape[..., None] > 0, _texture(u, large, colour, contrast=0.9, kind=label), pixels)
    pixels += 10 * (_noise(u, large, large // 2) - 0.5)[..., None]  # a little grain
    image = _average(np.clip(pixels, 0, 255))
    mask = np.where(_average(shape[..., None])[..., 0] >= 128, 255, 0)
    return image, mask.astype(np.uint8), label


class _Draws:
    """Hands out the random numbers of one image in turn."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self._next = 0

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        value = self._values[self._next % _DRAWS]
        self._next += 1
        return float(low + (high - low) * value)

    def choice(self, count: int) -> int:
        return min(int(self(0, count)), count - 1)

    def seed(self) -> int:
        return int(self(0, 2**31))


def _average(pixels: np.ndarray) -> np.ndarray:
    """(S * _SUPER, S * _SUPER, C) to (S, S, C) uint8 by the mean of each block."""
    size, channels = pixels.shape[0] // _SUPER, pixels.shape[2]
    blocks = pixels.reshape(size, _SUPER, size, _SUPER, channels).mean(axis=(1, 3))
    return np.floor(blocks + 0.5).astype(np.uint8)


def _colours(u: _Draws) -> tuple[np.ndarray, np.ndarray]:
    """A light colour for the object, a darker one for the background."""
    return np.array([u(130, 255) for _ in range(3)]), np.array([u(10, 110) for _ in range(3)])


def _noise(u: _Draws, size: int, cells: int) -> np.ndarray:
    """Smooth noise (size, size) in [0, 1] with `cells` bumps a side."""
    cells = max(2, cells)
    grid = uniform(u.seed(), 0, np.arange(cells * cells), 0).reshape(cells, cells).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BILINEAR))


def _texture(u: _Draws, size: int, colour: np.ndarray, contrast: float, kind: int) -> np.ndarray:
    """A patterned surface (size, size, 3) around one colour; `kind` (0 to 9) is a pattern, coarse or fine."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle, phase = u(0, math.pi), u(0, 2 * math.pi)
    frequency = u(3.0, 3.8) if kind % 2 else u(6.0, 7.5)
    along = 2 * math.pi * frequency * (x * math.cos(angle) + y * math.sin(angle)) + phase
    across = 2 * math.pi * frequency * (y * math.cos(angle) - x * math.sin(angle)) + phase
    match kind // 2:
        case 0:
            pattern = np.zeros_like(x)
        case 1:
            pattern = np.sin(along)
        case 2:
            pattern = np.sign(np.sin(along) * np.sin(across))
        case 3:
            pattern = np.where(np.sin(along) * np.sin(across) > 0.4, 1.0, -0.5)
        case _:
            pattern = 2 * _noise(u, size, int(2 * frequency)) - 1
    return (colour + contrast * pattern[..., None] * np.array([70.0, 70.0, 70.0])).astype(np.float32)


def _background(u: _Draws, size: int, colour: np.ndarray) -> np.ndarray:
    pixels = _texture(u, size, colour, contrast=0.3, kind=u.choice(10))
    return pixels + 40 * (_noise(u, size, 2 + u.choice(3)) - 0.5)[..., None]


def _clutter(u: _Draws, pixels: np.ndarray, colour: np.ndarray, other: np.ndarray) -> None:
    """Strokes and scraps over the background, some in the object's own colour; changes `pixels`."""
    size = pixels.shape[0]
    for _ in range(3 + u.choice(5)):
        scrap = Image.new("L", (size, size))
        pen = ImageDraw.Draw(scrap)
        x, y, reach = u(0, size), u(0, size), u(0.04, 0.13) * size
        if u() < 0.4:
            angle, length = u(0, 2 * math.pi), u(0.15, 0.5) * size
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            pen.line([(x, y), end], fill=255, width=max(1, int(u(0.015, 0.05) * size)))
        else:
            corners = 3 + u.choice(4)
            turns = sorted(u(0, 2 * math.pi) for _ in range(corners))
            pen.polygon([(x + reach * math.cos(t), y + reach * math.sin(t)) for t in turns], fill=255)
        mix = u()
        surface = 0.6 * mix * colour + (1 - 0.6 * mix) * other + np.array([u(-30, 30) for _ in range(3)])
        pixels[np.asarray(scrap) > 0] = surface


def _shape(u: _Draws, label: int, size: int) -> np.ndarray:
    """The object (size, size) float, 255 inside: its outline at a random place, size and tilt."""
    radius = u(0.2, 0.36) * size
    x, y = (u(radius, size - radius) for _ in range(2))
    tilt, stretch = u(-0.35, 0.35), u(0.85, 1.18)
    mirror = -1 if u() < 0.5 else 1
    image = Image.new("L", (size, size))
    pen = ImageDraw.Draw(image)
    for polygon, fill in _OUTLINES[CLASSES[label]]():
        placed = []
        for px, py in polygon:
            px, py = mirror * px * stretch, py / stretch
            placed.append(
                (
                    x + radius * (px * math.cos(tilt) - py * math.sin(tilt)),
                    y + radius * (px * math.sin(tilt) + py * math.cos(tilt)),
                )
            )
        pen.polygon(placed, fill=fill)
    return np.asarray(image, dtype=np.float32)


def _circle(radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> Polygon:
    turns = (2 * math.pi * k / 48 for k in range(48))
    return [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in turns]


def _star() -> Polygon:
    spokes = ((1.05 if k % 2 == 0 else 0.42, math.pi * k / 5 - math.pi / 2) for k in range(10))
    return [(r * math.cos(t), r * math.sin(t)) for r, t in spokes]


def _cross() -> Polygon:
    quarter = [(0.3, -1.0), (0.3, -0.3), (1.0, -0.3)]
    corners: Polygon = []
    for _ in range(4):
        corners += quarter
        quarter = [(-py, px) for px, py in quarter]
    return corners


def _heart() -> Polygon:
    turns = (2 * math.pi * k / 48 for k in range(48))
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15 - 0.1,
        )
        for t in turns
    ]


_TRIANGLE = [(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)]
_SQUARE = [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
_HOURGLASS = [(-0.8, -0.95), (0.8, -0.95), (0.12, 0.0), (0.8, 0.95), (-0.8, 0.95), (-0.12, 0.0)]
_ARROW = [(-1.0, -0.25), (0.05, -0.25), (0.05, -0.8), (1.0, 0.0), (0.05, 0.8), (0.05, 0.25), (-1.0, 0.25)]

# each outline is a list of polygons, filled (255) or cut out again (0) in turn
_OUTLINES: dict[str, Callable[[], list[tuple[Polygon, int]]]] = {
    "disc": lambda: [(_circle(0.9), 255)],
    "ring": lambda: [(_circle(0.95), 255), (_circle(0.5), 0)],
    "square": lambda: [(_SQUARE, 255)],
    "triangle": lambda: [(_TRIANGLE, 255)],
    "star": lambda: [(_star(), 255)],
    "cross": lambda: [(_cross(), 255)],
    "crescent": lambda: [(_circle(1.0), 255), (_circle(0.8, 0.45), 0)],
    "heart": lambda: [(_heart(), 255)],
    "hourglass": lambda: [(_HOURGLASS, 255)],
    "arrow": lambda: [(_ARROW, 255)],
}
