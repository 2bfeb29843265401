"""Domains on disk and procedural ones, the paper's transforms, batches that are functions of (seed, step).
Copy with: torch, numpy, pillow.

    Benchmark(root)         the domains of a folder (UnED layout or class folders), or without one the procedural domains
    .split(domain, name)    -> Split: the images of one split of one domain, and their labels
    TrainBatches[step, domain]  -> images (B, 3, H, W) uint8, labels (B,) int64 in 0..C-1, the same for any number of workers
    stream                  the batches of consecutive steps, each of the domain that the sampler draws, from 0 or more workers
    TestImages[i]           -> image (3, H, W) uint8, prepared as for evaluation
    normalise               uint8 (B, 3, H, W) -> float32, with the statistics of the backbone's weights

UnED layout:    ROOT/info_files/<domain>/<split>.json, a list of {"path": relative to ROOT/images, "class_id": int or [int, ...]};
                splits train, val, test, and where queries and index differ `index` (for test) and `small_index` (for val).
Class folders:  ROOT/<domain>/<class>/*.jpg; the classes are cut about 60 / 10 / 30 into train / val / test, class-disjoint.
"""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MEMORY_LIMIT = 2 << 30  # bytes of prepared uint8 pixels up to which images stay decoded in memory
INDEX_OF = {
    "test": "index",
    "val": "small_index",
}  # the split that is searched where a domain has it


class InputError(ValueError):
    """A mistake in what the user gave. The message is one sentence: what, its value, what is allowed, the remedy."""

    def __init__(
        self, message
    ):  # a worker process hands its error on as a traceback: the sentence is the last line
        super().__init__(message.strip().splitlines()[-1].removeprefix("data.InputError: "))


class Split:
    """The images of one split of one domain: `labels` and `image(i)`.

    labels   (N,) int32, or where an image has several classes a list of tuples
    classes  (N,) int64 in 0..C-1 and `num_classes` C: the labels renumbered for a classifier (single labels only)
    """

    def __init__(self, domain, name, labels, *, paths=None, pixels=None, folder=None):
        self.domain, self.name, self.labels, self.folder = domain, name, labels, folder
        self.paths = (
            None if paths is None else np.array([os.fsencode(path) for path in paths])
        )  # one block of memory
        self.pixels = pixels  # (N, H, W, 3) uint8
        if isinstance(labels, np.ndarray):
            names, classes = np.unique(labels, return_inverse=True)
            self.classes, self.num_classes = classes.astype(np.int64), len(names)

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        """Image i as an RGB PIL image. Raises InputError that names a file which is missing, truncated or no image."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[i])
        path = Path(self.folder, os.fsdecode(self.paths[i]))
        if (
            not path.exists()
        ):  # some archives store names as #Uxxxx where the manifest has the character itself
            escaped = "".join(
                c if ord(c) < 128 else f"#U{ord(c):04x}" for c in os.fsdecode(self.paths[i])
            )
            path = Path(self.folder, escaped) if Path(self.folder, escaped).exists() else path
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for broken files
            reason = (
                getattr(error, "strerror", None)
                or (str(error).splitlines() or [type(error).__name__])[0]
            )
            raise InputError(
                f"image {path} of domain {self.domain}, split {self.name}, cannot be read ({reason}): repair it or "
                "take it out of the data"
            ) from None


class Benchmark:
    """The domains of one data folder, or without a folder the procedural ones; splits are read when asked for.

    domains  names, sorted: all that the folder holds, or those asked for.
    Raises InputError for a folder or manifest that cannot be used, and for a domain that is not there.
    """

    def __init__(self, root=None, domains=None):
        self.root = None if root is None else Path(root)
        self.manifests = None
        self.domains = tuple(PROCEDURAL) if self.root is None else self._found(root)
        if domains is not None:
            for domain in domains:
                self._check(domain)
            self.domains = tuple(sorted(set(domains)))

    def _found(self, root):
        if not str(root) or not self.root.is_dir():
            raise InputError(
                f"data folder {str(root)!r} is not a folder: give one in the UnED layout, or one of class folders per "
                "domain"
            )
        self.manifests = self.root / "info_files" if (self.root / "info_files").is_dir() else None
        domains = tuple(
            sorted(
                p.name
                for p in (self.manifests or self.root).iterdir()
                if p.is_dir() and not p.name.startswith(".")
            )
        )
        if not domains:
            raise InputError(
                f"data folder {root} holds no domain: it needs info_files/<domain>/<split>.json and images/, or "
                "<domain>/<class>/ folders of images"
            )
        return domains

    def _check(self, domain):
        if domain not in self.domains:
            raise InputError(
                f"domain {domain!r} is not in {self.root or 'the procedural data'}: it has {', '.join(self.domains)}"
            )

    def split(self, domain, name):
        """The split `name` ("train", "val", "test", "index", "small_index") of a domain."""
        self._check(domain)
        if self.root is None:
            return procedural_split(domain, name)
        return (
            self._from_manifest(domain, name)
            if self.manifests
            else self._from_class_folders(domain, name)
        )

    def index_name(self, domain, name):
        """The split in which the queries of split `name` are searched: their own, unless the domain has one for it."""
        other = INDEX_OF.get(name)
        has_other = self.manifests and (self.manifests / domain / f"{other}.json").exists()
        return other if has_other else name

    def _from_manifest(self, domain, name):
        file = self.manifests / domain / f"{name}.json"
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"manifest {file} cannot be opened ({error.strerror}): each domain needs train, val and "
                "test"
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"manifest {file} is not JSON ({error}): write a list of path and class_id"
            ) from None
        if not isinstance(entries, list) or not entries:
            raise InputError(
                f"manifest {file} holds no list of images: write a list of objects with path and class_id"
            )
        paths, labels, several = [], [], False
        for row, entry in enumerate(entries):
            path = entry.get("path") if isinstance(entry, dict) else None
            label = entry.get("class_id") if isinstance(entry, dict) else None
            is_list = isinstance(label, list) and bool(label)
            ids = label if is_list else [label]
            if not isinstance(path, str) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
                raise InputError(
                    f"manifest {file} has {str(entry)[:120]} at entry {row}: it needs a path, and a class_id that is "
                    "an integer from 0 to 2^31 - 1, or a list of such"
                )
            if is_list and name == "train":
                raise InputError(
                    f"manifest {file} has the classes {label} at entry {row}: a training image has one class_id, an "
                    "integer; lists are for queries"
                )
            paths.append(path)
            labels.append(tuple(ids))
            several |= is_list
        labels = labels if several else np.array([ids[0] for ids in labels], dtype=np.int32)
        return Split(domain, name, labels, paths=paths, folder=self.root / "images")

    def _from_class_folders(self, domain, name):
        folder = self.root / domain
        classes = sorted(
            p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")
        )
        if len(classes) < 3:
            raise InputError(
                f"domain folder {folder} has {len(classes)} class folders: give at least 3, since train, val and test "
                "share no class"
            )
        order = np.random.default_rng(zlib.crc32(domain.encode())).permutation(
            len(classes)
        )  # not the sorted names: those
        val, test = (
            max(1, round(0.1 * len(classes))),
            max(1, round(0.3 * len(classes))),
        )  # often go by kind
        cuts = {"val": order[:val], "test": order[val : val + test], "train": order[val + test :]}
        paths, labels = [], []
        for label in sorted(cuts.get(name, ())):
            images = sorted(
                p.name
                for p in (folder / classes[label]).iterdir()
                if p.suffix.lower() in IMAGE_SUFFIXES
            )
            paths += [f"{classes[label]}/{image}" for image in images]
            labels += [label] * len(images)
        if not paths:
            raise InputError(
                f"domain folder {folder} has no image for split {name!r}: the splits of class folders are train, val "
                f"and test, and images end in {', '.join(IMAGE_SUFFIXES)}"
            )
        return Split(domain, name, np.array(labels, dtype=np.int32), paths=paths, folder=folder)


# Transforms (paper section 4; official setting) ----------------------------------------------------------------------------


def resize(image, width, height, antialias=True):
    """An RGB PIL image -> (height, width, 3) uint8, bilinear. antialias=False is the official code's TensorFlow resize."""
    if antialias:
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(
        pixels, (height, width), mode="bilinear", antialias=False, align_corners=False
    )
    return pixels[0].permute(1, 2, 0).round().byte().numpy()


def train_side(size):
    """Training images are resized to this side and cropped to `size`: 256 for 224."""
    return round(size * 256 / 224)


def prepare_train(image, size, antialias=True):
    """(R, R, 3) uint8 with R = train_side(size): the whole image, aspect ignored. Random crop and flip come later."""
    return resize(image, train_side(size), train_side(size), antialias)


def prepare_test(image, size, antialias=True):
    """(size, size, 3) uint8: the short side resized to `size`, then the centre."""
    short = min(image.size)
    width, height = (max(size, int(side * size / short)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return resize(image, width, height, antialias)[top : top + size, left : left + size]


def normalise(images, mean, std):
    """uint8 (B, 3, H, W) in 0..255 -> float32 (x / 255 - mean) / std, on the images' device."""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std)


def _decoded(split, prepare):
    """All images of a split after `prepare`: (N, 3, H, W) uint8. Pillow frees the interpreter while it decodes: threads."""
    first = prepare(split.image(0))
    pixels = np.empty((len(split), *first.shape), dtype=np.uint8)

    def fill(i):
        pixels[i] = prepare(split.image(i))

    with ThreadPoolExecutor(processors()) as pool:
        list(pool.map(fill, range(len(split))))
    return pixels


class TrainBatches(Dataset):
    """batches[step, domain] -> images (B, 3, H, W) uint8, labels (B,) int64 in 0..C-1.

    A batch is a function of (seed, step, domain): which images, without repetition where the domain has enough of them, and
    the crop and flip of each position. Splits stay decoded in memory where all of them fit into MEMORY_LIMIT bytes.
    min_area   None for the paper's crop, of a fixed size; or crops of an area drawn from min_area..1 of the image's and an
               aspect of 3:4 to 4:3, cut where they would not fit, and resized
    """

    def __init__(self, splits, size, batch_size, seed, *, antialias=True, min_area=None):
        self.splits, self.size, self.batch_size, self.seed, self.antialias = (
            splits,
            size,
            batch_size,
            seed,
            antialias,
        )
        self.min_area = min_area
        needed = sum(len(split) for split in splits.values()) * train_side(size) ** 2 * 3
        self.in_memory = needed <= MEMORY_LIMIT
        self.pixels = (
            {d: _decoded(s, self._prepare) for d, s in splits.items()} if self.in_memory else None
        )

    def _prepare(self, image):
        return prepare_train(image, self.size, self.antialias).transpose(2, 0, 1)  # (3, R, R)

    def __getitem__(self, key):
        step, domain = key
        split, batch, size, side = (
            self.splits[domain],
            self.batch_size,
            self.size,
            train_side(self.size),
        )
        rng = np.random.default_rng((self.seed, step))
        rows = rng.choice(len(split), batch, replace=len(split) < batch)
        if self.min_area is None:
            widths = heights = np.full(batch, size)
            lefts, tops = rng.integers(0, side - size + 1, (2, batch))
        else:
            areas, aspects = (
                rng.uniform(self.min_area, 1, batch),
                (4 / 3) ** rng.uniform(-1, 1, batch),
            )
            widths, heights = np.minimum(side, side * np.sqrt([areas * aspects, areas / aspects]))
            lefts, tops = rng.random((2, batch)) * (side - np.stack([widths, heights]))
        flips = rng.random(batch) < 0.5
        images = np.empty((batch, 3, size, size), dtype=np.uint8)
        for position, (row, left, top, width, height, flip) in enumerate(
            zip(rows, lefts, tops, widths, heights, flips)
        ):
            whole = self.pixels[domain][row] if self.in_memory else self._prepare(split.image(row))
            if self.min_area is None:
                crop = whole[:, top : top + size, left : left + size]
            else:
                box = (left, top, left + width, top + height)
                crop = Image.fromarray(whole.transpose(1, 2, 0)).resize(
                    (size, size), Image.Resampling.BILINEAR, box=box
                )
                crop = np.asarray(crop).transpose(2, 0, 1)
            images[position] = crop[:, :, ::-1] if flip else crop
        return torch.from_numpy(images), torch.from_numpy(split.classes[rows])


class TestImages(Dataset):
    """images[i] -> (3, size, size) uint8, as prepared for evaluation; kept decoded in memory with `keep`."""

    __test__ = False  # not a test class, whatever pytest makes of its name

    def __init__(self, split, size, *, antialias=True, keep=False):
        self.split, self.size, self.antialias = split, size, antialias
        self.pixels = _decoded(split, self._prepare) if keep else None

    def _prepare(self, image):
        return prepare_test(image, self.size, self.antialias).transpose(2, 0, 1)  # (3, size, size)

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        pixels = self._prepare(self.split.image(i)) if self.pixels is None else self.pixels[i]
        return torch.from_numpy(np.array(pixels))


def stream(batches, sampler, start, stop, workers):
    """Yields (domain, images, labels) for steps start..stop-1, drawing each domain from `sampler`.

    What a period of the sampler holds is decided at its start, so `workers` processes prepare its batches ahead of time.
    """
    plan = []
    loader = DataLoader(
        batches,
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    while start < stop:
        plan[:] = list(enumerate(sampler.upcoming(), start))[: stop - start]
        for (images, labels), (step, domain) in zip(loader, list(plan)):
            drawn = sampler.draw()
            assert drawn == domain
            yield domain, images, labels
        start += len(plan)


def processors():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# Procedural domains --------------------------------------------------------------------------------------------------------
#
# Eight domains that need no file. Each tells its classes apart by one cue, named after it, and varies all others freely: the
# colour that IS the class in "colour" means nothing in "shape", where the outline counts, and so on around. An embedding for
# all of them has to carry every cue, and each domain's classifier wants the other seven forgotten: the conflict that UDON is
# about. Classes of train, val and test are disjoint. A mirrored image is of the same class (the transforms flip): where that
# is not so by itself, images are mirrored at random here too.

CANVAS = 64  # pixels; drawn twice as large, then averaged 2 x 2


def _colour(rng, hue=None, saturation=(0.45, 1.0), value=(0.45, 1.0)):
    """An (r, g, b) of a hue in [0, 1) (any, if None)."""
    h = (rng.random() if hue is None else hue) * 6 % 6
    s, v = rng.uniform(*saturation), rng.uniform(*value)
    return tuple(
        int(255 * v * (1 - s * min(max(abs((h - shift + 3) % 6 - 3) - 1, 0), 1)))
        for shift in (0, 2, 4)
    )


def _background(rng):
    """A dark or pale canvas, a little lighter on one side, a pen for it, and the range of values that stand out on it."""
    dark = rng.random() < 0.5
    one, other = (
        _colour(rng, saturation=(0.0, 0.3), value=(0.0, 0.2) if dark else (0.85, 1.0))
        for _ in range(2)
    )
    corners = np.array(
        [one, one, other, other] if rng.random() < 0.5 else [one, other, one, other], dtype=np.uint8
    )
    image = Image.fromarray(corners.reshape(2, 2, 3)).resize(
        (2 * CANVAS, 2 * CANVAS), Image.Resampling.BILINEAR
    )
    return image, ImageDraw.Draw(image), (0.6, 1.0) if dark else (0.2, 0.65)


def _outline(rng, roughness=0.25):
    """A random closed outline, as Fourier coefficients of the radius: (amplitudes, phases) of harmonics 1 to 5."""
    return rng.normal(0, roughness, 5) / np.array([1.5, 1, 1, 1.3, 1.6]), rng.uniform(
        0, 2 * np.pi, 5
    )


def _polygon(outline, centre, radius, turn=0.0, stretch=1.0):
    amplitudes, phases = outline
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    harmonics = np.arange(1, 6)[:, None] * angle + phases[:, None]
    r = radius * np.clip(1 + (amplitudes[:, None] * np.cos(harmonics)).sum(0), 0.25, 1.8)
    x, y = (
        centre[0] + r * np.cos(angle + turn) * stretch,
        centre[1] + r * np.sin(angle + turn) / stretch,
    )
    return list(zip(x.tolist(), y.tolist()))


def _places(rng, number, distance, margin=16):
    """`number` points of the canvas that keep `distance` pixels from one another, as far as that can be had."""
    points = []
    while len(points) < number:
        tries = rng.uniform(margin, 2 * CANVAS - margin, (12, 2))
        gaps = [min((np.hypot(*(p - q)) for q in points), default=1e9) for p in tries]
        best = int(np.argmax([min(g, distance) for g in gaps]))
        points.append(tries[best])
    return points


def _mark(pen, kind, centre, radius, colour, turn=0.0):
    """A small filled figure: a disc (kind 2) or a regular polygon of `kind` corners."""
    x, y = centre
    if kind == 2:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        pen.regular_polygon((x, y, radius * 1.2), int(kind), rotation=int(turn), fill=colour)


def _distinct(rng, number, *levels):
    """`number` different rows, each a choice of one out of levels[i] values at place i."""
    chosen = rng.permutation(int(np.prod(levels)))[:number]
    return list(zip(*(column.tolist() for column in np.unravel_index(chosen, levels))))


def _colour_classes(rng, number):
    return _distinct(rng, number, 5, 5, 5)  # hue of the ground, of the body, of its spots


def _draw_colour(rng, look):
    ground, body, spots = (level / 5 + rng.normal(0, 0.015) for level in look)
    image, pen, _ = _background(rng)
    pen.rectangle((0, 0, *image.size), fill=_colour(rng, ground, (0.3, 0.45), (0.8, 0.95)))
    centre = rng.uniform(54, 74, 2)
    pen.polygon(
        _polygon(_outline(rng), centre, rng.uniform(36, 46)),
        fill=_colour(rng, body, (0.85, 1.0), (0.5, 0.65)),
    )
    kind = rng.integers(2, 6)
    for place in _places(rng, rng.integers(2, 6), 36, 34):
        inside = centre + (place - 64) * 0.7
        _mark(
            pen,
            kind,
            inside,
            rng.uniform(9, 13),
            _colour(rng, spots, (0.85, 1.0), (0.9, 1.0)),
            rng.uniform(0, 360),
        )
    return image


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
        pen, colour, gap, slope = (
            ImageDraw.Draw(stripes),
            _colour(rng, value=value),
            rng.uniform(10, 20),
            rng.normal(0, 60),
        )
        for x in np.arange(-80, 210, gap):
            pen.line((x, 0, x + slope, 128), fill=colour, width=int(gap / 2))
        image.paste(stripes, mask=mask)
    return image


def _texture_classes(rng, number):
    gratings = [(wavelength, angle) for wavelength in range(3) for angle in range(4)]
    pairs = [(*one, *other) for i, one in enumerate(gratings) for other in gratings[:i]]
    return [pairs[i] for i in rng.permutation(len(pairs))[:number]]


def _draw_texture(rng, look):
    y, x = np.mgrid[: 2 * CANVAS : 2, : 2 * CANVAS : 2] / (2 * CANVAS)
    if rng.random() < 0.5:
        x = -x
    field = np.zeros_like(x)
    for wavelength, angle in (look[:2], look[2:]):
        cycles = 3.0 * 1.7 ** (wavelength + rng.normal(0, 0.03))
        theta = np.pi / 2 * (angle / 3) + rng.normal(0, 0.02)
        field += np.sin(
            2 * np.pi * cycles * (x * np.cos(theta) + y * np.sin(theta)) + rng.uniform(0, 2 * np.pi)
        )
    blend = (1 / (1 + np.exp(-4 * field)))[..., None]
    low, high = _colour(rng, value=(0.1, 0.5)), _colour(rng, value=(0.6, 1.0))
    if rng.random() < 0.5:
        low, high = high, low
    texture = Image.fromarray((blend * low + (1 - blend) * high).astype(np.uint8)).resize(
        (2 * CANVAS, 2 * CANVAS)
    )
    image, _, _ = _background(rng)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(
        _polygon(_outline(rng), rng.uniform(56, 72, 2), rng.uniform(50, 64)), fill=255
    )
    image.paste(texture, mask=mask)
    return image


def _layout_classes(rng, number):
    patterns = {}  # five of the cells of a 4 x 4 grid, none the mirror of another
    while len(patterns) < number:
        cells = rng.permutation(16)[:5]
        patterns[
            min(
                tuple(sorted(cells.tolist())), tuple(sorted((cells + 3 - 2 * (cells % 4)).tolist()))
            )
        ] = None
    return list(patterns)


def _draw_layout(rng, cells):
    image, pen, value = _background(rng)
    shift, kind, colour = rng.uniform(-5, 5, 2), rng.integers(3, 6), _colour(rng, value=value)
    for cell in cells:
        place = (np.array([cell % 4, cell // 4]) * 28 + 22) + shift + rng.normal(0, 2, 2)
        _mark(
            pen,
            kind,
            place,
            rng.uniform(8, 12),
            colour if rng.random() < 0.5 else _colour(rng, value=value),
            rng.uniform(0, 360),
        )
    return image


def _count_classes(rng, number):
    return [look for look in _distinct(rng, number + 1, 4, 4, 4) if any(look)][
        :number
    ]  # discs, bars, rings


def _draw_count(rng, look):
    image, pen, value = _background(rng)
    places = iter(_places(rng, sum(look), 36))
    one = _colour(rng, value=value) if rng.random() < 0.5 else None
    for kind, number in enumerate(look):
        colour = one or _colour(rng, value=value)
        for x, y in (next(places) for _ in range(number)):
            half, angle = rng.uniform(13, 16), rng.uniform(0, np.pi)
            if kind == 0:
                _mark(pen, 2, (x, y), half - 2, colour)
            elif kind == 1:
                dx, dy = 1.2 * half * np.cos(angle), 1.2 * half * np.sin(angle)
                pen.line((x - dx, y - dy, x + dx, y + dy), fill=colour, width=7)
            else:
                pen.ellipse((x - half, y - half, x + half, y + half), outline=colour, width=5)
    return image


def _orientation_classes(rng, number):
    return _distinct(rng, number, 8, 8)  # angle of the long bar, of the double bar, 0 to 90 degrees


def _draw_orientation(rng, look):
    image, pen, value = _background(rng)
    mirror = rng.choice([-1, 1])
    places = _places(rng, 2, 44, 40)
    for bar, (level, place) in enumerate(zip(look, places)):
        theta = np.pi / 2 * level / 7 + rng.normal(0, 0.02)
        along = np.array([mirror * np.cos(theta), np.sin(theta)]) * rng.uniform(28, 36)
        across = np.array([-along[1], along[0]]) / np.hypot(*along) * 7
        colour = _colour(rng, value=value)
        for offset in (0,) if bar == 0 else (-1, 1):
            a, b = place - along + offset * across, place + along + offset * across
            pen.line((*a, *b), fill=colour, width=int(rng.uniform(8, 12) if bar == 0 else 5))
    return image


def _symbol_classes(rng, number):
    return [
        [(rng.permutation(9)[: rng.integers(3, 5)]) for _ in range(2)] for _ in range(number)
    ]  # two strokes, 3 x 3


def _draw_symbol(rng, strokes):
    image, pen, value = _background(rng)
    size, centre, slant = rng.uniform(24, 36), rng.uniform(54, 74, 2), rng.normal(0, 0.1)
    colour, width = _colour(rng, value=value), int(rng.integers(4, 10))
    for stroke in strokes:
        dots = np.stack([stroke % 3 - 1, stroke // 3 - 1], 1) + rng.normal(
            0, 0.07, (len(stroke), 2)
        )
        dots[:, 0] += slant * dots[:, 1]
        pen.line(
            [tuple(p) for p in (centre + size * dots).tolist()],
            fill=colour,
            width=width,
            joint="curve",
        )
    return image


def _face_classes(rng, number):
    return _distinct(
        rng, number, 3, 3, 3, 3, 3
    )  # height, distance and size of the eyes, width and bend of the mouth


def _draw_face(rng, look):
    height, distance, size, wide, bend = (level - 1 for level in look)
    image, pen, value = _background(rng)
    s, (x, y) = rng.uniform(0.85, 1.1), rng.uniform(58, 70, 2)
    pen.ellipse(
        (x - 42 * s, y - 48 * s, x + 42 * s, y + 48 * s),
        fill=_colour(rng, saturation=(0.1, 0.6), value=value),
    )
    ink = (
        _colour(rng, value=(0.0, 0.2))
        if value[0] > 0.5
        else _colour(rng, saturation=(0.0, 0.3), value=(0.9, 1.0))
    )
    for side in (-1, 1):
        eye = (
            x + side * (19 + 7 * distance) * s + rng.normal(0, 0.8),
            y - (12 + 9 * height) * s + rng.normal(0, 0.8),
        )
        _mark(pen, 2, eye, (6.5 + 3 * size) * s, ink)
    half, dip = (18 + 8 * wide) * s, 11 * bend * s
    t = np.linspace(-1, 1, 9)
    mouth = np.stack([x + half * t, y + 24 * s + dip * (0.5 - t * t)], 1)
    pen.line(
        [tuple(p) for p in mouth.tolist()], fill=ink, width=int(rng.integers(4, 8)), joint="curve"
    )
    nose = rng.uniform(4, 12)
    pen.line((x, y - nose * s, x, y + nose * s), fill=ink, width=4)
    return image


PROCEDURAL = {  # classes, renderer, number of train / val / test classes, images of a train class: most, least
    "colour": (_colour_classes, _draw_colour, (90, 12, 20), (14, 14)),
    "count": (_count_classes, _draw_count, (41, 6, 16), (32, 32)),
    "faces": (_face_classes, _draw_face, (100, 12, 20), (12, 12)),
    "layout": (_layout_classes, _draw_layout, (120, 12, 20), (10, 10)),
    "orientation": (_orientation_classes, _draw_orientation, (40, 8, 16), (30, 30)),
    "shape": (_shape_classes, _draw_shape, (120, 12, 20), (12, 12)),
    "symbols": (
        _symbol_classes,
        _draw_symbol,
        (200, 12, 20),
        (60, 4),
    ),  # the long tail: image counts fall as 1 / rank
    "texture": (_texture_classes, _draw_texture, (42, 8, 16), (32, 32)),
}
VAL_IMAGES, TEST_IMAGES = 24, 8  # of a class: few classes must choose the best checkpoint


def procedural_split(domain, name):
    """Split "train", "val" or "test" of a procedural domain: always the same images, CANVAS x CANVAS pixels."""
    if name not in ("train", "val", "test"):
        raise InputError(
            f"split {name!r} is not one of the procedural domains' splits: use train, val or test"
        )
    make_classes, draw, counts, (most, least) = PROCEDURAL[domain]
    looks = make_classes(np.random.default_rng(zlib.crc32(domain.encode())), sum(counts))
    start = {"train": 0, "val": counts[0], "test": counts[0] + counts[1]}[name]
    number = counts[("train", "val", "test").index(name)]
    pixels, labels = [], []
    for rank, label in enumerate(range(start, start + number)):
        for i in range(
            {"train": max(least, most // (rank + 1)), "val": VAL_IMAGES, "test": TEST_IMAGES}[name]
        ):
            image = draw(
                np.random.default_rng((zlib.crc32(domain.encode()), label, i)), looks[label]
            )
            pixels.append(np.asarray(image.reduce(2)))
            labels.append(label)
    return Split(domain, name, np.array(labels, dtype=np.int32), pixels=np.stack(pixels))
