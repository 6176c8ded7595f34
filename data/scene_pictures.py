"""What a scene is, and its picture: coloured shapes on a light ground, each in a quadrant of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 168
"""Pixels; twice what the encoder sees."""
OVERSAMPLING = 4

COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 150, 55),
    "blue": (35, 65, 215),
    "yellow": (245, 210, 35),
    "purple": (135, 45, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring", "arrow", "heart")
QUADRANTS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}

Kind = tuple[str, str]
"""Colour and shape."""


@dataclass(frozen=True)
class Thing:
    """An object of a scene; lengths in sides of a quadrant, angle in degrees."""

    colour: str
    shape: str
    quadrant: str
    radius: float = 0.36
    dx: float = 0.0
    dy: float = 0.0
    angle: float = 0.0
    tint: tuple[int, int, int] = (0, 0, 0)

    @property
    def kind(self) -> Kind:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    background: tuple[int, int, int]
    things: tuple[Thing, ...]


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, SIDE x SIDE pixels, antialiased."""
    side = SIDE * OVERSAMPLING
    image = Image.new("RGB", (side, side), scene.background)
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        colour = tuple(max(0, min(255, c + t)) for c, t in zip(COLOURS[thing.colour], thing.tint, strict=True))
        column, row = QUADRANTS[thing.quadrant]
        centre = ((column + 0.5 + thing.dx) * side / 2, (row + 0.5 + thing.dy) * side / 2)
        _draw_shape(canvas, thing.shape, centre, thing.radius * side / 2, math.radians(thing.angle), colour)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _draw_shape(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    angle: float,
    colour: tuple[int, ...],
) -> None:
    """Fills a shape that fits in the circle of `radius` pixels around `centre`, turned by `angle` radians."""
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "ring":
        canvas.ellipse(box, outline=colour, width=round(radius * 0.4))
    else:
        sin, cos = math.sin(angle), math.cos(angle)
        corners = [(x + radius * (u * cos - v * sin), y + radius * (u * sin + v * cos)) for u, v in _corners(shape)]
        canvas.polygon(corners, fill=colour)


def _corners(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in the unit circle, upright: x to the right, y down."""
    if shape == "square":
        return _around([1.0] * 4, start=math.pi / 4)
    if shape == "triangle":
        return _around([1.0] * 3)
    if shape == "star":
        return _around([1.0, 0.42] * 5)
    if shape == "cross":
        right = [(0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3), (0.3, 0.95)]
    elif shape == "arrow":
        right = [(0.0, -1.0), (0.8, -0.1), (0.3, -0.1), (0.3, 0.95)]
    else:  # a heart: https://mathworld.wolfram.com/HeartCurve.html
        turns = [k * math.pi / 20 for k in range(21)]
        right = [
            (
                16 / 17 * math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
            )
            for t in turns
        ]
    return right + [(-u, v) for u, v in reversed(right)]


def _around(radii: Sequence[float], start: float = 0.0) -> list[tuple[float, float]]:
    """Points at equal angles, clockwise; the first is `start` radians from the top."""
    angles = [start + k * 2 * math.pi / len(radii) for k in range(len(radii))]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]
