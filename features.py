"""Training on features of a frozen backbone, computed once and kept on disk (--freeze-backbone).

    computed(directory, model, images, ...)   -> {domain: (N, 1 + V, D) float16}, from the files
                                                 <domain>.npy, computed where they are missing
    FeatureBatches(images, features)[step, domain]  -> features (B, D) float16, labels (B,) int64
    TestFeatures(directory, model, ...)[images]     -> (N, D) float32, of images of val and test

The features of an image are the L2-normalised outputs of the backbone for 1 + V views: the test
view, and V random training crops that are a function of (seed, row). They are computed in the same
batches on any number of processes and after any interruption, so that they are equal bit for bit.
N images of a domain, R images of a batch, D backbone width.
Copy with: data, folders, images, procedural, export, model, timm_backbone, checkpoint, distributed,
torch, numpy, pillow.
"""

import contextlib
import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import distributed
from checkpoint import write_json
from model import UDON

DTYPE = np.dtype("<f2")  # float16
PASSES = 128  # of the backbone at once
SAVE_SECONDS = 10.0  # between two records of the progress: so much is repeated after a kill


class FeaturesError(ValueError):
    """Files of features that cannot be used: one sentence."""


# Batches ------------------------------------------------------------------------------------------


class FeatureBatches:
    """batches[step, domain] -> features (B, D) float16, labels (B,) int64 in 0..C-1.

    The images of a batch are those of `images`[step, domain]; the view of each is drawn by the same
    generator. An image known to be bad is replaced as there.

    features  {domain: (N, 1 + V, D) float16}
    """

    in_memory = True  # or in files mapped to it: no worker process is needed

    def __init__(self, images: data.TrainBatches, features: dict[str, np.ndarray]):
        self.images, self.splits, self.features = images, images.splits, features

    def __getitem__(self, key: tuple[int, str]) -> tuple[torch.Tensor, torch.Tensor]:
        step, domain = key
        split, features, share = self.splits[domain], self.features[domain], self.images.share
        rng, rows = self.images.rows(step, domain)
        views = rng.integers(features.shape[1], size=len(rows))
        for position in np.flatnonzero(np.isin(rows, list(split.bad_rows))):
            seed = (self.images.seed, step, int(position))
            rows[position] = next(self.images.candidates(domain, rows[position], seed))
        rows = rows[share]
        return torch.from_numpy(features[rows, views[share]]), torch.from_numpy(split.classes[rows])

    def files(self, step: int, domain: str) -> list[str]:
        """What a batch consists of, as data.TrainBatches.files."""
        return self.images.files(step, domain)


class Views:
    """views[domain, row] -> (R, 1 + V, 3, H, W) uint8: the views of `size` images from that row on,
    or of those that are left; anything for bad images that are skipped."""

    def __init__(self, images: data.TrainBatches, count: int):
        self.images, self.splits, self.count = images, images.splits, count
        self.size = max(1, PASSES // (1 + count))
        self.tests = {
            domain: data.TestImages(
                *(split, images.size),
                antialias=images.antialias,
                interpolation=images.interpolation,
            )
            for domain, split in images.splits.items()
        }

    def __getitem__(self, key: tuple[str, int]) -> torch.Tensor:
        domain, first = key
        split = self.splits[domain]
        rows = range(first, min(first + self.size, len(split)))
        views = self.tests[domain][rows][:, None].repeat(1, 1 + self.count, 1, 1, 1)
        for i, row in enumerate(rows if self.count else ()):
            try:
                views[i, 1:] = torch.from_numpy(self.images.crops(domain, row, self.count))
            except data.InputError as error:
                split.skip(row, error)
        return views


class TestFeatures(dict):
    """{images: (N, D) float32}: outputs of the frozen backbone, for evaluate.evaluate.

    They are files of `directory`, read where they are used, so that they are computed once for all
    runs with these images and this backbone, interrupted ones included. The rows of bad images are
    NaN in the files and 0 here.
    """

    __test__ = False  # pytest must not collect it because of its name

    def __init__(self, directory: Path, model: UDON, preprocessing: dict):
        self.directory = directory
        self.width, self.backbone = model.backbone.width, backbone_identity(model, preprocessing)

    def path(self, images: data.TestImages) -> Path:
        about = {**self.backbone, "images": images.split.digest(), "size": images.size}
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        return self.directory / f"{images.split.domain}-{images.split.name}-{digest}.npy"

    def __contains__(self, images: data.TestImages) -> bool:
        if not super().__contains__(images) and self.path(images).exists():
            with contextlib.suppress(ValueError, EOFError):  # damaged: they are computed again
                self._read(images)
        return super().__contains__(images)

    def __setitem__(self, images: data.TestImages, features: torch.Tensor) -> None:
        if distributed.rank() == 0:
            rows, path = features.numpy(), self.path(images)
            rows[list(images.split.bad_rows)] = np.nan
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened(path.with_suffix(".partial"), "wb") as file:
                np.save(file, rows)
            os.replace(path.with_suffix(".partial"), path)
        distributed.agreed(None)
        self._read(images)

    def _read(self, images):
        array, split = np.load(self.path(images), mmap_mode="c"), images.split
        if array.shape != (len(images), self.width) or array.dtype != np.float32:
            raise ValueError(f"{array.shape} of {array.dtype}")
        for row in np.flatnonzero(np.isnan(array[:, 0])).tolist():
            if row not in split.bad_rows:
                name = split.path(row)
                split.skip(
                    row, data.InputError(f"image {name} was unreadable when it was first used")
                )
            array[row] = 0
        super().__setitem__(images, torch.from_numpy(array))


# Files --------------------------------------------------------------------------------------------


class Store:
    """The files of a directory: <domain>.npy, and about.json, which says what they hold.

    shapes    {domain: (N, 1 + V, D)}
    identity  what the features are a function of, as plain values
    rows      {domain: number of rows that are computed}
    bad_rows  {domain: {row: reason}}: images that cannot be read
    cpu_seconds  spent by this process, since the files were created
    """

    def __init__(self, directory: Path, identity: dict, shapes: dict[str, tuple[int, int, int]]):
        self.directory, self.shapes = directory, shapes
        self.identity = json.loads(json.dumps(identity))  # as it is read again
        self.rows = dict.fromkeys(shapes, 0)
        self.bad_rows: dict[str, dict[int, str]] = {domain: {} for domain in shapes}
        self.cpu_seconds = 0.0
        self.unsaved: set[str] = set()  # domains with rows that are not on the disk for certain
        self.saved, self.cpu_started = time.perf_counter(), time.process_time()

    def path(self, domain: str) -> Path:
        return self.directory / f"{domain}.npy"

    @property
    def about(self) -> Path:
        return self.directory / "about.json"

    def open(self) -> None:
        """Creates the files, or reads how far they are computed. Raises FeaturesError for features
        of other images or another backbone, and for files that are damaged."""
        if distributed.rank() == 0 and not self.about.exists():
            self._create()
        distributed.agreed(None)
        try:
            found = json.loads(self.about.read_text(encoding="utf-8"))
            others = [k for k, v in self.identity.items() if found["identity"].get(k) != v]
            if not others:
                self._read(found)
        except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise FeaturesError(
                f"the features in {self.directory} are damaged ({error}): delete that directory, "
                "and they are computed again"
            ) from None
        if others:
            raise FeaturesError(
                f"the features in {self.directory} are those of another run ({' and '.join(others)}"
                " are others): delete that directory, and they are computed again"
            )

    def _create(self) -> None:
        self.directory.mkdir(exist_ok=True)
        for domain, shape in self.shapes.items():
            header = {"descr": DTYPE.str, "fortran_order": False, "shape": shape}
            with opened(self.path(domain), "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                size = file.tell() + math.prod(shape) * DTYPE.itemsize
                if hasattr(os, "posix_fallocate"):  # a full disk shows before the long work
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
        self.write_about()

    def _read(self, found):
        for domain, (count, *_) in self.shapes.items():
            self.rows[domain] = int(found["rows"][domain])
            self.bad_rows[domain] = {int(k): str(v) for k, v in found["bad_rows"][domain].items()}
            for row in (self.rows[domain] - 1, *self.bad_rows[domain]):
                if not -1 <= row < count:
                    raise ValueError(f"{domain} has no row {row}")
        self.cpu_seconds = float(found["cpu_seconds"])
        self.arrays()

    def arrays(self) -> dict[str, np.memmap]:
        """{domain: (N, 1 + V, D) float16}, read from the disk where they are used."""
        arrays = {domain: np.load(self.path(domain), mmap_mode="r") for domain in self.shapes}
        for domain, array in arrays.items():
            if array.shape != self.shapes[domain] or array.dtype != DTYPE:
                raise ValueError(f"{domain}.npy holds {array.shape} of {array.dtype}")
        return arrays

    def write(self, domain: str, first: int, features: np.ndarray) -> None:
        """Writes the features (R, 1 + V, D) float16 of the rows from `first` on. Not through the
        memory map: there, a full disk would end the process by a signal."""
        array = np.load(self.path(domain), mmap_mode="r")
        with opened(self.path(domain)) as file:
            file.seek(array.offset + first * array.strides[0])
            file.write(features.tobytes())
        self.unsaved.add(domain)

    @property
    def due(self) -> bool:
        return time.perf_counter() - self.saved > SAVE_SECONDS

    def save(self) -> None:
        """Records the progress, once the rows that all processes have written are on the disk."""
        for domain in self.unsaved:
            with opened(self.path(domain)) as file:
                os.fsync(file.fileno())
        self.unsaved.clear()
        now = time.process_time()
        self.cpu_seconds += now - self.cpu_started
        self.saved, self.cpu_started = time.perf_counter(), now
        distributed.collected(None)  # rank 0 waits for all
        if distributed.rank() == 0:
            self.write_about()

    def write_about(self) -> None:
        names = ("identity", "rows", "bad_rows", "cpu_seconds")
        write_json(self.about, {name: getattr(self, name) for name in names})


@contextlib.contextmanager
def opened(path, mode="r+b"):
    """A file to write into; an error names it."""
    try:
        with open(path, mode) as file:
            yield file
    except OSError as error:
        error.filename = str(path)
        raise


def backbone_identity(model: UDON, preprocessing: dict) -> dict:
    """What the backbone's outputs for an image are a function of, as plain values by name."""
    # An older checkpoint, and features of it, do not say that they are bilinear.
    stated = [x for x in preprocessing.items() if x != ("interpolation", "bilinear")]
    digest = hashlib.sha256()
    for name, value in model.backbone.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "the weights of the backbone": digest.hexdigest(),
        "the backbone": getattr(model.backbone, "architecture", None),
        "the preprocessing": dict(stated),
    }


def identity_of(model: UDON, images: data.TrainBatches, views: int, preprocessing: dict) -> dict:
    """What the features of training images are a function of, as plain values by name."""
    return backbone_identity(model, preprocessing) | {
        "the images": {domain: split.digest() for domain, split in images.splits.items()},
        "--image-size": images.size,
        "--min-area": images.min_area,
        "--precision": str(model.precision),
        "--seed": images.seed,
        "--views": views,
    }


# Computing ----------------------------------------------------------------------------------------


def computed(
    directory: Path,
    model: UDON,
    images: data.TrainBatches,
    views: int,
    preprocessing: dict,
    workers: int,
    interruption,
) -> dict[str, np.ndarray]:
    """{domain: (N, 1 + V, D) float16}: the features of all images, unit rows, mapped from the disk.

    They are computed from where an earlier call ended, by all processes together; the progress is
    saved every ten seconds, and when `interruption`, a rundir.Interruption, asks for the end.
    Raises FeaturesError for a directory that holds others, InputError for unreadable images.
    """
    shapes = {d: (len(s), 1 + views, model.backbone.width) for d, s in images.splits.items()}
    store = Store(directory, identity_of(model, images, views, preprocessing), shapes)
    store.open()
    for domain, bad_rows in store.bad_rows.items():
        for row, reason in bad_rows.items():
            images.splits[domain].skip(row, data.InputError(reason))
    if any(store.rows[domain] < count for domain, (count, *_) in shapes.items()):
        compute(store, model, Views(images, views), preprocessing, workers, interruption)
    return {domain: np.asarray(array) for domain, array in store.arrays().items()}


def compute(store, model, views, preprocessing, workers, interruption) -> None:
    """Computes and writes the rows that are missing. In a round, each process takes a batch."""
    rank, size = distributed.rank(), distributed.size()
    firsts = {d: range(store.rows[d], len(s), views.size) for d, s in views.splits.items()}
    keys = [(domain, first) for domain in firsts for first in firsts[domain][rank::size]]
    meter = Meter(store)
    interruption.polled = True
    model.eval()
    with contextlib.closing(data.loaded(views, [keys], workers)) as stream:
        for domain, starts in firsts.items():
            for number in range(0, len(starts), size):
                if number + rank < len(starts):
                    (_, first), batch = next(stream)
                    store.write(domain, first, embedded(model, batch, preprocessing))
                end = starts[number] + size * views.size
                store.rows[domain] = min(end, len(views.splits[domain]))
                meter.report()
                requested = distributed.largest(interruption.requested)  # by any process
                if requested or distributed.largest(int(store.due)):
                    save(store, views.splits)
                if requested:
                    distributed.agreed(None)  # rank 0 has saved: torchrun stops all when one ends
                    interruption.requested = requested
                    interruption.stop()
    save(store, views.splits)
    interruption.polled = False


@torch.inference_mode()
def embedded(model, images, preprocessing) -> np.ndarray:
    """(R, 1 + V, 3, H, W) uint8 -> unit rows (R, 1 + V, D) float16."""
    device = next(model.parameters()).device
    mean, std = preprocessing["mean"], preprocessing["std"]
    precision = model.precision or torch.float32
    parts = []
    for part in images.flatten(0, 1).split(PASSES):
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            outputs = model.backbone(data.normalise(part.to(device), mean, std))
        parts.append(F.normalize(outputs.float(), dim=1).half().cpu())
    features = torch.cat(parts).unflatten(0, images.shape[:2])
    if not features.isfinite().all():
        raise data.InputError(
            "features of training images are not finite: check the weights of --init"
        )
    return features.numpy()


def save(store, splits) -> None:
    """Saves the progress, with the bad images that any process has found."""
    for split in splits.values():
        data.share_bad_rows(split)
    store.bad_rows = {domain: split.bad_rows for domain, split in splits.items()}
    store.save()


class Meter:
    """Prints what is to be computed, and at most every five seconds how far it is."""

    def __init__(self, store: Store):
        counts, self.views, widths = zip(*store.shapes.values())
        self.store, self.views, images = store, self.views[0], sum(counts)
        self.total, self.first = images * self.views, self.done
        self.started = time.perf_counter()
        self.printed = self.started - 4  # the first time after a second
        print(
            f"features of {images:,} training images, {self.views} views of each: {self.total:,} "
            f"images through the backbone, {self.first:,} of them done; "
            f"{2 * self.total * widths[0] / 1e6:,.1f} MB in {store.directory}",
            flush=True,
        )

    @property
    def done(self) -> int:
        return self.views * sum(self.store.rows.values())

    def report(self) -> None:
        now = time.perf_counter()
        if now - self.printed < 5 and self.done < self.total:
            return
        self.printed = now
        rate = (self.done - self.first) / (now - self.started)
        left = int((self.total - self.done) / rate)
        print(
            f"features {self.done:,} of {self.total:,}   {rate:,.0f} images/s   "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            flush=True,
        )
