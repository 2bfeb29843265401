"""Eight rendered domains that need no files: arrays of pixels and labels.

    DOMAINS                       {name: Domain}, in alphabetical order
    render(domain, split)         -> pixels (N, 64, 64, 3) uint8, labels (N,) int32

The classes of each domain differ in one cue, after which the domain is named; everything else
varies at random. The colour that defines the classes of "colour" is a nuisance factor in "shape",
where only the outline counts, and so on. An embedding for all domains must represent every cue,
while the classifier of each domain is best served by forgetting the other seven: the conflict that
UDON is about. Classes of train, val and test are disjoint. A mirrored image belongs to the same
class, because the transforms flip images: where this does not follow from the cue, images are
mirrored at random.
Copy with: numpy, pillow.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SPLITS = ("train", "val", "test")
SIDE = 64  # pixels of an image
CANVAS = 2 * SIDE  # images are drawn twice as large, then averaged 2 x 2
VAL_IMAGES, TEST_IMAGES = 24, 8  # of a class; few val classes must choose the best checkpoint

Colour = tuple[int, int, int]
Generator = np.random.Generator


class Domain(NamedTuple):
    """A domain: how its classes are chosen and drawn, and how many there are."""

    make_classes: Callable  # (rng, number) -> a list of `number` different classes
    draw: Callable  # (rng, class) -> PIL image of CANVAS x CANVAS pixels
    classes: tuple[int, int, int]  # of train, val, test
    images: tuple[int, int]  # of the largest and of the smallest training class


def render(domain: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images of a split: pixels (N, 64, 64, 3) uint8, labels (N,) int32.

    The result depends on the two names only. Raises ValueError for a name that is unknown.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r} is unknown: the domains are {', '.join(DOMAINS)}")
    if split not in SPLITS:
        raise ValueError(
            f"split {split!r} is not one of the procedural domains' splits: use train, val or test"
        )
    make_classes, draw, counts, (most, least) = DOMAINS[domain]
    seed = zlib.crc32(domain.encode())
    classes = make_classes(np.random.default_rng(seed), sum(counts))
    first = sum(counts[: SPLITS.index(split)])
    pixels, labels = [], []
    for rank in range(counts[SPLITS.index(split)]):
        label = first + rank
        number = {"train": max(least, most // (rank + 1)), "val": VAL_IMAGES, "test": TEST_IMAGES}
        for i in range(number[split]):
            image = draw(np.random.default_rng((seed, label, i)), classes[label])
            pixels.append(np.asarray(image.reduce(2)))
            labels.append(label)
    return np.stack(pixels), np.array(labels, dtype=np.int32)


# What the domains share ---------------------------------------------------------------------------


def _colour(
    rng: Generator,
    hue: float | None = None,
    saturation: tuple[float, float] = (0.45, 1.0),
    value: tuple[float, float] = (0.45, 1.0),
) -> Colour:
    """A random colour in the given ranges of HSV; `hue` in [0, 1), or any if None."""
    h = (rng.random() if hue is None else hue) * 6 % 6
    s, v = rng.uniform(*saturation), rng.uniform(*value)
    distances = (abs((h - shift + 3) % 6 - 3) for shift in (0, 2, 4))  # from red, green, blue
    return tuple(int(255 * v * (1 - s * min(max(d - 1, 0), 1))) for d in distances)


def _background(rng: Generator):
    """A dark or pale canvas with a gradient -> image, its pen, the HSV values that contrast."""
    dark = rng.random() < 0.5
    value = (0.0, 0.2) if dark else (0.85, 1.0)
    a, b = (_colour(rng, saturation=(0.0, 0.3), value=value) for _ in range(2))
    corners = [a, a, b, b] if rng.random() < 0.5 else [a, b, a, b]
    corners = Image.fromarray(np.array(corners, dtype=np.uint8).reshape(2, 2, 3))
    image = corners.resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    return image, ImageDraw.Draw(image), (0.6, 1.0) if dark else (0.2, 0.65)


def _outline(rng: Generator, roughness: float = 0.25):
    """A random closed outline: Fourier coefficients of its radius, harmonics 1 to 5, as
    amplitudes (5,) and phases (5,)."""
    amplitudes = rng.normal(0, roughness, 5) / np.array([1.5, 1, 1, 1.3, 1.6])
    return amplitudes, rng.uniform(0, 2 * np.pi, 5)


def _polygon(outline, centre, radius, turn=0.0, stretch=1.0):
    """The corners of an outline on the canvas: a list of 48 (x, y)."""
    amplitudes, phases = outline
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    harmonics = np.arange(1, 6)[:, None] * angle + phases[:, None]
    r = radius * np.clip(1 + (amplitudes[:, None] * np.cos(harmonics)).sum(0), 0.25, 1.8)
    x = centre[0] + r * np.cos(angle + turn) * stretch
    y = centre[1] + r * np.sin(angle + turn) / stretch
    return list(zip(x.tolist(), y.tolist()))


def _positions(rng: Generator, number, distance, margin=16):
    """`number` points of the canvas, `distance` pixels apart where 12 tries find such a point."""
    points = []
    while len(points) < number:
        tries = rng.uniform(margin, CANVAS - margin, (12, 2))
        gaps = [min((np.hypot(*(p - q)) for q in points), default=1e9) for p in tries]
        best = int(np.argmax([min(gap, distance) for gap in gaps]))
        points.append(tries[best])
    return points


def _mark(pen, corners, centre, radius, colour, turn=0.0):
    """Draws a small filled figure: a disc (corners 2) or a regular polygon."""
    x, y = centre
    if corners == 2:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        pen.regular_polygon((x, y, radius * 1.2), int(corners), rotation=int(turn), fill=colour)


def _combinations(rng: Generator, number, *levels):
    """`number` different tuples, whose element i is one of levels[i] values."""
    chosen = rng.permutation(int(np.prod(levels)))[:number]
    return list(zip(*(column.tolist() for column in np.unravel_index(chosen, levels))))


# colour: the hues of the ground, of the body and of its spots -------------------------------------


def _colour_classes(rng, number):
    return _combinations(rng, number, 5, 5, 5)


def _draw_colour(rng, hues):
    ground, body, spots = (level / 5 + rng.normal(0, 0.015) for level in hues)
    image, pen, _ = _background(rng)
    pen.rectangle((0, 0, *image.size), fill=_colour(rng, ground, (0.3, 0.45), (0.8, 0.95)))
    centre = rng.uniform(54, 74, 2)
    corners = _polygon(_outline(rng), centre, rng.uniform(36, 46))
    pen.polygon(corners, fill=_colour(rng, body, (0.85, 1.0), (0.5, 0.65)))
    kind = rng.integers(2, 6)
    for position in _positions(rng, rng.integers(2, 6), 36, 34):
        inside = centre + (position - SIDE) * 0.7
        radius = rng.uniform(9, 13)
        colour = _colour(rng, spots, (0.85, 1.0), (0.9, 1.0))
        _mark(pen, kind, inside, radius, colour, rng.uniform(0, 360))
    return image


# count: the numbers of discs, bars and rings ------------------------------------------------------


def _count_classes(rng, number):
    nonempty = [counts for counts in _combinations(rng, number + 1, 4, 4, 4) if any(counts)]
    return nonempty[:number]


def _draw_count(rng, counts):
    image, pen, value = _background(rng)
    positions = iter(_positions(rng, sum(counts), 36))
    shared = _colour(rng, value=value) if rng.random() < 0.5 else None
    for kind, number in enumerate(counts):
        colour = shared or _colour(rng, value=value)
        for x, y in (next(positions) for _ in range(number)):
            half, angle = rng.uniform(13, 16), rng.uniform(0, np.pi)
            if kind == 0:
                _mark(pen, 2, (x, y), half - 2, colour)
            elif kind == 1:
                dx, dy = 1.2 * half * np.cos(angle), 1.2 * half * np.sin(angle)
                pen.line((x - dx, y - dy, x + dx, y + dy), fill=colour, width=7)
            else:
                pen.ellipse((x - half, y - half, x + half, y + half), outline=colour, width=5)
    return image


# faces: height, distance and size of the eyes, width and bend of the mouth ------------------------


def _face_classes(rng, number):
    return _combinations(rng, number, 3, 3, 3, 3, 3)


def _draw_face(rng, levels):
    height, distance, size, wide, bend = (level - 1 for level in levels)
    image, pen, value = _background(rng)
    s, (x, y) = rng.uniform(0.85, 1.1), rng.uniform(58, 70, 2)
    skin = _colour(rng, saturation=(0.1, 0.6), value=value)
    pen.ellipse((x - 42 * s, y - 48 * s, x + 42 * s, y + 48 * s), fill=skin)
    if value[0] > 0.5:
        ink = _colour(rng, value=(0.0, 0.2))
    else:
        ink = _colour(rng, saturation=(0.0, 0.3), value=(0.9, 1.0))
    for side in (-1, 1):
        eye_x = x + side * (19 + 7 * distance) * s + rng.normal(0, 0.8)
        eye_y = y - (12 + 9 * height) * s + rng.normal(0, 0.8)
        _mark(pen, 2, (eye_x, eye_y), (6.5 + 3 * size) * s, ink)
    half, dip = (18 + 8 * wide) * s, 11 * bend * s
    t = np.linspace(-1, 1, 9)
    mouth = np.stack([x + half * t, y + 24 * s + dip * (0.5 - t * t)], 1)
    mouth = [tuple(point) for point in mouth.tolist()]
    pen.line(mouth, fill=ink, width=int(rng.integers(4, 8)), joint="curve")
    nose = rng.uniform(4, 12)
    pen.line((x, y - nose * s, x, y + nose * s), fill=ink, width=4)
    return image


# layout: which five cells of a 4 x 4 grid hold a mark ---------------------------------------------


def _layout_classes(rng, number):
    patterns = {}  # a dict keeps their order; no pattern is the mirror image of another
    while len(patterns) < number:
        cells = rng.permutation(16)[:5]
        mirrored = cells + 3 - 2 * (cells % 4)
        pattern = min(tuple(sorted(cells.tolist())), tuple(sorted(mirrored.tolist())))
        patterns[pattern] = None
    return list(patterns)


def _draw_layout(rng, cells):
    image, pen, value = _background(rng)
    shift, kind, shared = rng.uniform(-5, 5, 2), rng.integers(3, 6), _colour(rng, value=value)
    for cell in cells:
        position = (np.array([cell % 4, cell // 4]) * 28 + 22) + shift + rng.normal(0, 2, 2)
        radius = rng.uniform(8, 12)
        colour = shared if rng.random() < 0.5 else _colour(rng, value=value)
        _mark(pen, kind, position, radius, colour, rng.uniform(0, 360))
    return image


# orientation: the angles of the single bar and of the double bar, 0 to 90 degrees -----------------


def _orientation_classes(rng, number):
    return _combinations(rng, number, 8, 8)


def _draw_orientation(rng, levels):
    image, pen, value = _background(rng)
    mirror = rng.choice([-1, 1])
    positions = _positions(rng, 2, 44, 40)
    for bar, (level, position) in enumerate(zip(levels, positions)):
        theta = np.pi / 2 * level / 7 + rng.normal(0, 0.02)
        along = np.array([mirror * np.cos(theta), np.sin(theta)]) * rng.uniform(28, 36)
        across = np.array([-along[1], along[0]]) / np.hypot(*along) * 7
        colour = _colour(rng, value=value)
        for offset in (0,) if bar == 0 else (-1, 1):
            start, end = position - along + offset * across, position + along + offset * across
            width = int(rng.uniform(8, 12) if bar == 0 else 5)
            pen.line((*start, *end), fill=colour, width=width)
    return image


# shape: a closed outline --------------------------------------------------------------------------


def _shape_classes(rng, number):
    return [_outline(rng, 0.4) for _ in range(number)]


def _draw_shape(rng, outline):
    image, pen, value = _background(rng)
    radius = rng.uniform(30, 42)
    centre = rng.uniform(54, 74, 2)
    points = _polygon(outline, centre, radius, rng.normal(0, 0.08), rng.uniform(0.94, 1.06))
    pen.polygon(points, fill=_colour(rng, value=value))
    if rng.random() < 0.3:  # filled with stripes of another colour
        stripes, mask = image.copy(), Image.new("L", image.size)
        ImageDraw.Draw(mask).polygon(points, fill=255)
        pen = ImageDraw.Draw(stripes)
        colour, gap, slope = _colour(rng, value=value), rng.uniform(10, 20), rng.normal(0, 60)
        for x in np.arange(-80, 210, gap):
            pen.line((x, 0, x + slope, CANVAS), fill=colour, width=int(gap / 2))
        image.paste(stripes, mask=mask)
    return image


# symbols: two strokes, each through three or four points of a 3 x 3 grid --------------------------


def _symbol_classes(rng, number):
    return [[rng.permutation(9)[: rng.integers(3, 5)] for _ in range(2)] for _ in range(number)]


def _draw_symbol(rng, strokes):
    image, pen, value = _background(rng)
    size, centre, slant = rng.uniform(24, 36), rng.uniform(54, 74, 2), rng.normal(0, 0.1)
    colour, width = _colour(rng, value=value), int(rng.integers(4, 10))
    for stroke in strokes:
        jitter = rng.normal(0, 0.07, (len(stroke), 2))
        dots = np.stack([stroke % 3 - 1, stroke // 3 - 1], 1) + jitter
        dots[:, 0] += slant * dots[:, 1]
        points = [tuple(point) for point in (centre + size * dots).tolist()]
        pen.line(points, fill=colour, width=width, joint="curve")
    return image


# texture: the wavelengths and angles of two gratings ----------------------------------------------


def _texture_classes(rng, number):
    gratings = [(wavelength, angle) for wavelength in range(3) for angle in range(4)]
    pairs = [(*one, *other) for i, one in enumerate(gratings) for other in gratings[:i]]
    return [pairs[i] for i in rng.permutation(len(pairs))[:number]]


def _draw_texture(rng, gratings):
    y, x = np.mgrid[:CANVAS:2, :CANVAS:2] / CANVAS
    if rng.random() < 0.5:
        x = -x
    field = np.zeros_like(x)
    for wavelength, angle in (gratings[:2], gratings[2:]):
        cycles = 3.0 * 1.7 ** (wavelength + rng.normal(0, 0.03))
        theta = np.pi / 2 * (angle / 3) + rng.normal(0, 0.02)
        phase = 2 * np.pi * cycles * (x * np.cos(theta) + y * np.sin(theta))
        field += np.sin(phase + rng.uniform(0, 2 * np.pi))
    blend = (1 / (1 + np.exp(-4 * field)))[..., None]
    low, high = _colour(rng, value=(0.1, 0.5)), _colour(rng, value=(0.6, 1.0))
    if rng.random() < 0.5:
        low, high = high, low
    texture = Image.fromarray((blend * low + (1 - blend) * high).astype(np.uint8))
    image, _, _ = _background(rng)
    mask = Image.new("L", image.size)
    points = _polygon(_outline(rng), rng.uniform(56, 72, 2), rng.uniform(50, 64))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    image.paste(texture.resize(image.size), mask=mask)
    return image


DOMAINS = {  # symbols is long-tailed: its number of images falls as 1 / rank
    "colour": Domain(_colour_classes, _draw_colour, (90, 12, 20), (14, 14)),
    "count": Domain(_count_classes, _draw_count, (41, 6, 16), (32, 32)),
    "faces": Domain(_face_classes, _draw_face, (100, 12, 20), (12, 12)),
    "layout": Domain(_layout_classes, _draw_layout, (120, 12, 20), (10, 10)),
    "orientation": Domain(_orientation_classes, _draw_orientation, (40, 8, 16), (30, 30)),
    "shape": Domain(_shape_classes, _draw_shape, (120, 12, 20), (12, 12)),
    "symbols": Domain(_symbol_classes, _draw_symbol, (200, 12, 20), (60, 4)),
    "texture": Domain(_texture_classes, _draw_texture, (42, 8, 16), (32, 32)),
}
