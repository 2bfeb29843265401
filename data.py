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

import argparse
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import procedural

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MEMORY_LIMIT = 2 << 30  # bytes of prepared uint8 pixels up to which images stay decoded in memory
INDEX_OF = {"test": "index", "val": "small_index"}  # searched where a domain has them


class InputError(ValueError):
    """Data that cannot be used: what, its value, what is allowed and the remedy, in a sentence."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one sentence on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


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
        self.domains = tuple(procedural.DOMAINS) if self.root is None else self._found(root)
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
            return self._rendered(domain, name)
        if self.manifests:
            return self._from_manifest(domain, name)
        return self._from_class_folders(domain, name)

    def index_name(self, domain, name):
        """The split in which the queries of split `name` are searched: their own, unless the domain has one for it."""
        other = INDEX_OF.get(name)
        has_other = self.manifests and (self.manifests / domain / f"{other}.json").exists()
        return other if has_other else name

    def _rendered(self, domain, name):
        if name not in procedural.SPLITS:
            raise InputError(
                f"split {name!r} is not one of the procedural domains' splits: use train, val or "
                "test"
            )
        pixels, labels = procedural.render(domain, name)
        return Split(domain, name, labels, pixels=pixels)

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
    """Images of a split as prepared for evaluation; kept decoded in memory with `keep`.

    images[rows] -> (B, 3, size, size) uint8 for a slice, range or list of rows.
    """

    __test__ = False  # pytest must not collect it because of its name

    def __init__(self, split: Split, size: int, *, antialias: bool = True, keep: bool = False):
        self.split, self.size, self.antialias = split, size, antialias
        self.pixels = _decoded(split, self._prepare) if keep else None

    def _prepare(self, image):
        return prepare_test(image, self.size, self.antialias).transpose(2, 0, 1)  # (3, size, size)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, rows: slice | range | list[int]) -> torch.Tensor:
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[rows].copy())
        rows = np.arange(len(self))[rows]
        images = np.empty((len(rows), 3, self.size, self.size), dtype=np.uint8)
        for position, row in enumerate(rows.tolist()):
            images[position] = self._prepare(self.split.image(row))
        return torch.from_numpy(images)

    def batches(self, size: int, workers: int = 0) -> Iterator[torch.Tensor]:
        """Yields all images in order, (size, 3, H, W) uint8 each, the last batch perhaps smaller.

        Images that are not in memory are decoded by up to `workers` processes.
        """
        rows = [slice(first, first + size) for first in range(0, len(self), size)]
        workers = 0 if self.pixels is not None else min(workers, len(rows) // 2)
        return (images for _, images in loaded(self, [rows], workers))


# Loading ------------------------------------------------------------------------------------------


class _Guarded(Dataset):
    """A dataset whose items are InputErrors where loading them raises one. A worker process would
    turn the exception into a traceback; a value reaches the parent as it is."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        try:
            return self.dataset[key]
        except InputError as error:
            return error


def loaded(dataset: Dataset, plans: Iterable[list], workers: int) -> Iterator[tuple]:
    """Yields (key, dataset[key]) for all keys of all plans, in order.

    `workers` processes load the items of a plan ahead of time; 0 loads them here. A plan is taken
    from `plans` when all items of the previous one have been used. Raises what dataset[key] raises,
    at its turn.
    """
    keys = []
    loader = DataLoader(
        _Guarded(dataset),
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    for plan in plans:
        keys[:] = plan
        for item, key in zip(loader, plan):
            if isinstance(item, InputError):
                raise item
            yield key, item


def stream(
    batches: TrainBatches, sampler, start: int, stop: int, workers: int
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yields (domain, images, labels) for steps start..stop-1, drawing each domain from `sampler`.

    `workers` processes prepare batches ahead of time, as far as the sampler's draws are decided.
    """

    def plans():
        step = start
        while step < stop:
            draws = sampler.upcoming()[: stop - step]
            yield list(enumerate(draws, step))
            step += len(draws)

    for (_, domain), (images, labels) in loaded(batches, plans(), workers):
        drawn = sampler.draw()
        assert drawn == domain
        yield domain, images, labels


def same_file_rows(queries: Split, index: Split) -> np.ndarray:
    """(Q, 1) int64: the row of each query's own image in the index, or -1."""
    rows = np.arange(len(queries)) if queries is index else np.full(len(queries), -1)
    return rows[:, None]


def processors():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
