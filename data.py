"""Data directories, training batches as functions of (seed, step), and a check of all files.

    Benchmark(root)             the domains of a directory, or without one the procedural domains
    .split(domain, name)        -> Split: the images of one split of one domain, or "all", and their
                                labels
    TrainBatches[step, domain]  -> images (B, 3, H, W) uint8, labels (B,) int64 in 0..C-1
    TestImages[rows]            -> (B, 3, H, W) uint8, prepared for evaluation
    stream(batches, sampler, start, stop, workers)  the batches of consecutive steps
    share_bad_rows(split)                           what several processes found unreadable
    same_file_rows(queries, index)                  the rows of each query's own file in the index
    open_image, prepare_train, prepare_test, normalise, ...   as in images.py

    python data.py check DIR [--json FILE]   opens every image and lists what is wrong

UnED layout:    ROOT/info_files/<domain>/<split>.json, a list of {"path": relative to ROOT/images,
                "class_id": int or [int, ...]}; splits train, val, test, and where queries and index
                differ `index` (searched by test) and `small_index` (searched by val).
Class folders:  ROOT/<domain>/<class>/**/*.jpg; the classes are divided about 60 / 10 / 30 into
                train / val / test. Or ROOT/<domain>/<split>/<class>/**/*.jpg, or for one domain
                ROOT/<split>/<class>/**/*.jpg, with splits train, val, test.
Copy with: distributed, folders, images, procedural, torch, numpy, pillow.
"""

import argparse
import atexit
import collections
import contextlib
import difflib
import functools
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import distributed
import procedural
from folders import (
    ClassFolders,
    Entries,
    Files,
    by_suffix,
    conflicts,
    is_image,
    look_up,
    missing_files,
    read_class_folders,
    read_manifest,
    split_folders,
    visible_directories,
    visible_files,
)
from images import (
    SUFFIXES,
    InputError,
    normalise,
    open_image,
    open_reduced,
    prepare_test,
    prepare_train,
    printable,
    resize,
    resizing,
    train_side,
)

__all__ = [
    "Benchmark",
    "InputError",
    "Parser",
    "Split",
    "TestImages",
    "TrainBatches",
    "check",
    "loaded",
    "normalise",
    "open_image",
    "prepare_test",
    "prepare_train",
    "printable",
    "processors",
    "resize",
    "resizing",
    "same_file_rows",
    "share_bad_rows",
    "stream",
    "train_side",
]

MEMORY_LIMIT = 2 << 30  # bytes of prepared uint8 pixels up to which images stay decoded in memory
SKIP_LIMIT = 0.01  # share of a split's images that may be skipped
INDEX_OF = {"test": "index", "val": "small_index"}  # searched where a domain has them


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one sentence on stderr and exit status 2.

    remedies  {a word that is mistaken for a command: what to type instead}
    """

    def __init__(self, *, remedies: dict[str, str] | None = None, **arguments):
        super().__init__(allow_abbrev=False, **arguments)
        self.remedies = remedies or {}
        self.commands = None

    def add_subparsers(self, **arguments):
        self.commands = super().add_subparsers(parser_class=Parser, **arguments)
        return self.commands

    def error(self, message: str) -> NoReturn:
        remedy = "--help lists the options"
        words = re.findall(r"(?<=unrecognized arguments: )\S+|(?<=invalid choice: ')[^']*", message)
        for word in words[:1]:
            remedy = self.remedies.get(word) or self._alternatives(word) or remedy
        self.fail(f"{message}; {remedy}")

    def fail(self, sentence: str) -> NoReturn:
        """Ends the process with status 2. Of several processes that fail, the first one prints."""
        text = f"{self.prog}: {distributed.prefix()}{printable(sentence)}\n"
        self.exit(2, text if distributed.first_to_end() else None)

    def _alternatives(self, word: str) -> str | None:
        """Commands and options that `word` may be meant to be."""
        parsers = [self, *(self.commands.choices.values() if self.commands else ())]
        options = {name for parser in parsers for name in parser._option_string_actions}
        names = (
            options if word.startswith("-") else set(self.commands.choices if self.commands else ())
        )
        parts = {name for name in names if word.lstrip("-") in name.lstrip("-").split("-")}
        close = sorted(parts) or difflib.get_close_matches(word, names, 3, 0.7)
        return f"did you mean {' or '.join(close)}?" if close else None

    @contextlib.contextmanager
    def sentences(
        self,
        errors: tuple[type[Exception], ...] = (),
        memory: str = "use smaller images or fewer of them",
        remedy: str = "fix this and try again",
    ) -> Iterator[None]:
        """A context for all that a command does. InputError and `errors`, files and outputs that
        cannot be used, and a lack of memory end the process with one sentence on stderr and status
        2. A reader of the output that has ended, as `head` does, Ctrl-C, and the end of another
        process of torchrun end it quietly."""
        if hasattr(sys.stdout, "reconfigure"):  # names of files may be undecodable
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            try:
                yield
            finally:
                if sys.stdout:
                    sys.stdout.flush()
        except distributed.PeerError as error:
            if not error.stopped:
                time.sleep(distributed.PATIENCE)  # until torchrun stops it by a signal
            sys.exit(error.status)
        except (InputError, *errors) as error:
            self.fail(str(error))
        except BrokenPipeError:
            discard_output()
            sys.exit(128 + signal.SIGPIPE)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except OSError as error:
            discard_output()
            place, reason = error.filename or "the output", error.strerror or error
            self.fail(f"{place} cannot be used ({reason}): {remedy}")
        except (MemoryError, RuntimeError) as error:  # numpy's; torch's, without a class on a CPU
            if worker_has_ended(error):
                self.fail(WORKER_ENDED)
            texts = ("allocate memory", "size calculation overflowed")
            out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not out_of_memory and not any(text in str(error) for text in texts):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            self.fail(f"out of memory ({reason}): {memory}")


def discard_output() -> None:
    """Lets the interpreter end without another error of an output that cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usable_device(name: str) -> str:
    """The device of a name, "auto" being a GPU where there is one. Raises InputError for a device
    that torch does not know or cannot compute on here."""
    device = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--device {device} cannot be used here ({reason}): use cpu") from None
    return device


def processors() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# Splits -------------------------------------------------------------------------------------------


class Paths(Sequence):
    """A sequence of paths in two arrays: worker processes share them without copies, and a long
    path costs no more than its own length."""

    def __init__(self, paths: Iterable[str]):
        encoded = [os.fsencode(path) for path in paths]
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        i = range(len(self.ends))[i]
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.bytes[start : self.ends[i]].tobytes())


_numbers = itertools.count()


class Split:
    """The images of one split of one domain; `image(i)` opens one.

    labels   (N,) int32, or a list of N tuples where an image has several classes
    classes  (N,) int64 in 0..C-1, the labels renumbered for a classifier; for single labels only
    num_classes  C; `class_names`, C texts: those of directories, or the labels
    paths    N file names below `folder`; None for images in memory
    pixels   (N, H, W, 3) uint8 of images in memory; None for files
    files    (N,) int64; rows of equal numbers are the same file, also in other splits
    missing  {path: reason} of files that cannot be opened and are no rows of the split
    bad_rows {row: reason} of images that turned out to be unreadable
    """

    def __init__(
        self,
        domain: str,
        name: str,
        labels: np.ndarray | list[tuple[int, ...]],
        *,
        paths: Sequence[str] | None = None,
        pixels: np.ndarray | None = None,
        folder: str | os.PathLike | None = None,
        files: np.ndarray | None = None,
        on_bad_image: str = "stop",
        missing: dict[str, str] | None = None,
        label_names: Sequence[str] | None = None,
    ):
        self.domain, self.name, self.labels, self.folder = domain, name, labels, folder
        self.label_names = label_names
        self.paths = None if paths is None else Paths(paths)
        self.pixels = pixels
        self.files = self._own_files() if files is None else files
        self.on_bad_image = on_bad_image
        self.missing, self.bad_rows = missing or {}, {}
        self._check_skipped()
        if isinstance(labels, np.ndarray):
            names, classes = np.unique(labels, return_inverse=True)
            self.classes, self.num_classes = classes.astype(np.int64), len(names)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        """The file of image i, or a name for one in memory."""
        if self.paths is None:
            return f"{self.domain}/{self.name} row {i}"
        return os.path.join(self.folder, self.paths[i])

    def image(self, i: int) -> Image.Image:
        """Image i at full scale, RGB. Raises InputError that names a file that cannot be used."""
        return self.reduced_image(i)[0]

    def reduced_image(self, i: int, short_side: int | None = None):
        """Image i and its box, as images.open_reduced returns them."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[i]), None
        try:
            return open_reduced(self.path(i), short_side)
        except InputError as error:
            raise InputError(f"{error} (domain {self.domain}, split {self.name})") from None

    @property
    def class_names(self) -> list[str]:
        """The names of the classes 0..C-1; for single labels only."""
        labels = np.unique(self.labels).tolist()
        return [str(i) if self.label_names is None else self.label_names[i] for i in labels]

    @property
    def skipped(self) -> dict[str, str]:
        """{path: reason} of all images of the split that cannot be used."""
        return self.missing | {self.path(row): why for row, why in sorted(self.bad_rows.items())}

    def skip(self, i: int, error: InputError) -> None:
        """Records that image i is unreadable. Raises the error unless bad images are to be
        skipped, and InputError if they are more than 1 % of the split."""
        if self.on_bad_image != "skip":
            raise error
        self.bad_rows[int(i)] = str(error)
        self._check_skipped()

    def _check_skipped(self):
        skipped, total = len(self.missing) + len(self.bad_rows), len(self) + len(self.missing)
        if skipped > SKIP_LIMIT * total:
            raise InputError(
                f"{skipped} of {total} images of domain {self.domain}, split {self.name}, cannot "
                f"be used, more than the {SKIP_LIMIT:.0%} that may be skipped; the first: "
                f"{next(iter(self.skipped.values()))}"
            )

    def _own_files(self):
        """(N,) numbers for files that have not been looked up, by path; images in memory are all
        different."""
        if self.paths is None:
            return np.array([next(_numbers) for _ in range(len(self))], dtype=np.int64)
        paths = [os.path.realpath(self.path(i)) for i in range(len(self))]
        return np.array([hash(path) for path in paths], dtype=np.int64)

    def digest(self) -> str:
        """SHA-256 of the labels and of the paths or pixels."""
        images = [self.pixels] if self.paths is None else [self.paths.bytes, self.paths.ends]
        several = isinstance(self.labels, list)
        labels = np.frombuffer(repr(self.labels).encode(), np.uint8) if several else self.labels
        digest = hashlib.sha256()
        for values in (labels, *images):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def select(self, rows: np.ndarray) -> "Split":
        """The split of these rows alone."""
        labels = self.labels
        several = isinstance(labels, list)
        return Split(
            self.domain,
            self.name,
            [labels[i] for i in rows] if several else labels[rows],
            paths=None if self.paths is None else [self.paths[i] for i in rows],
            pixels=None if self.pixels is None else self.pixels[rows],
            folder=self.folder,
            files=self.files[rows],
            label_names=self.label_names,
        )


def together(splits: Sequence[Split]) -> Split:
    """The split "all" of several of one domain. A file of several has the classes of all."""
    places, labels = {}, {}  # of each file
    for split in splits:
        for row, (file, ids) in enumerate(zip(split.files.tolist(), split.labels)):
            places.setdefault(file, (split, row))
            labels.setdefault(file, set()).update(np.atleast_1d(ids).tolist())
    first, ids = splits[0], [tuple(sorted(values)) for values in labels.values()]
    in_memory = first.paths is None
    return Split(
        *(first.domain, "all"),
        np.array(ids, dtype=np.int32)[:, 0] if max(map(len, ids)) == 1 else ids,
        paths=None if in_memory else [split.paths[row] for split, row in places.values()],
        pixels=np.stack([s.pixels[row] for s, row in places.values()]) if in_memory else None,
        folder=first.folder,
        files=np.array(list(places)),
        on_bad_image=first.on_bad_image,
        missing={path: why for split in splits for path, why in split.missing.items()},
        label_names=first.label_names,
    )


def share_bad_rows(split: Split) -> None:
    """Tells all processes of the images that any has found unreadable. Raises InputError if
    together they are too many."""
    for bad_rows in distributed.collected(dict(split.bad_rows)):
        for row in bad_rows.keys() - split.bad_rows.keys():
            split.skip(row, InputError(bad_rows[row]))


def same_file_rows(queries: Split, index: Split) -> np.ndarray:
    """(Q, E) int64: the rows of the index that are the same file as each query, then -1.

    E is the largest number of such rows, at least 1.
    """
    order = np.argsort(index.files, kind="stable")
    ordered = index.files[order]
    first = np.searchsorted(ordered, queries.files, side="left")
    counts = np.searchsorted(ordered, queries.files, side="right") - first
    columns = np.arange(max(1, counts.max(initial=0)))
    positions = np.minimum(first[:, None] + columns, len(order) - 1)
    return np.where(columns < counts[:, None], order[positions], -1)


# Domains ------------------------------------------------------------------------------------------


class Benchmark:
    """The domains of a data directory, or without one the procedural domains.

    domains       names, sorted: all that the directory has, or those given
    notes         sentences about the splits read so far: what was ignored, counted once, or is
                  shared by training and test
    on_bad_image  "stop": a file that cannot be used is an InputError; "skip": up to 1 % of a split
                  are left out
    Raises InputError for a directory or manifest that cannot be used, and for an unknown domain.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        domains: Iterable[str] | None = None,
        *,
        on_bad_image: str = "stop",
    ):
        self.root = None if root is None else Path(root)
        self.on_bad_image = on_bad_image
        self.notes: list[str] = []
        self.manifests: Path | None = None
        self._splits: dict[tuple[str, str], Split] = {}
        self._class_folders: dict[str, ClassFolders] = {}
        self.folders = {} if root is None else self._find_folders(root)
        self.domains = tuple(sorted(self.folders)) or tuple(procedural.DOMAINS)
        if domains is not None:
            for domain in domains:
                self._check_domain(domain)
            self.domains = tuple(sorted(set(domains)))

    def _find_folders(self, root) -> dict[str, Path]:
        """{domain: its folder of manifests or class folders}."""
        if not str(root) or not self.root.is_dir():
            raise InputError(
                f"data folder {str(root)!r} is not a folder: give one in the UnED layout, or one "
                "of class folders per domain"
            )
        if (self.root / "info_files").is_dir():
            self.manifests = self.root / "info_files"
        elif split_folders(self.root):
            return {self.root.resolve().name or "data": self.root}
        parent = self.manifests or self.root
        folders = {name: parent / name for name in visible_directories(parent)}
        if not folders:
            raise InputError(
                f"data folder {root} holds no domain: it needs info_files/<domain>/<split>.json "
                "and images/, or <domain>/<class>/ folders of images"
            )
        if self.manifests is None and self._holds_images(folders.values()):
            raise InputError(
                f"data folder {root} has class folders where domains are expected: give its "
                f"parent, {self.root.resolve().parent}, with one folder per domain"
            )
        stray = [] if self.manifests else visible_files(parent)
        if stray:
            self._note(f"{parent}: ignored {by_suffix(stray)}")
        return folders

    @staticmethod
    def _holds_images(folders):
        """Whether these are class folders: without folders in them, but with images."""
        if any(map(visible_directories, folders)):
            return False
        return any(is_image(name) for folder in folders for name in visible_files(folder))

    def _note(self, text):
        if printable(text) not in self.notes:
            self.notes.append(printable(text))

    def _check_domain(self, domain):
        if domain not in self.domains:
            raise InputError(
                f"domain {domain!r} is not in {self.root or 'the procedural data'}: it has "
                f"{', '.join(self.domains)}"
            )

    def split(self, domain: str, name: str) -> Split:
        """The split "train", "val", "test", "index" or "small_index" of a domain, or "all", the
        images of all of these.

        A file that several entries name counts once. Raises InputError for a split that does not
        exist, for files that are missing and for contradicting labels.
        """
        self._check_domain(domain)
        if (domain, name) not in self._splits:
            if name == "all":
                split = together([self.split(domain, part) for part in self.split_names(domain)])
            else:
                is_file = self.root is not None
                split = self._read(domain, name) if is_file else self._rendered(domain, name)
            self._splits[domain, name] = split
            self._note_shared(domain, name)
        return self._splits[domain, name]

    def index_name(self, domain: str, name: str) -> str:
        """The split in which the queries of split `name` are searched: their own, unless the
        domain has one for it."""
        other = INDEX_OF.get(name)
        has_other = self.manifests and (self.manifests / domain / f"{other}.json").exists()
        return other if has_other else name

    def split_names(self, domain: str) -> list[str]:
        """The splits of a domain."""
        indexes = [self.index_name(domain, name) for name in INDEX_OF]
        return list(dict.fromkeys(["train", "val", "test", *indexes]))

    @property
    def skipped(self) -> dict[str, str]:
        """{path: reason} of all files that the splits read so far skip."""
        return {path: why for split in self._splits.values() for path, why in split.skipped.items()}

    def entries(self, domain: str, name: str) -> Entries:
        """The images of a split as the directory lists them."""
        if self.manifests:
            file = self.manifests / domain / f"{name}.json"
            return read_manifest(file, str(self.root / "images"), single=name == "train")
        folders = self.class_folders(domain)
        if name not in folders.splits or not folders.splits[name].paths:
            raise InputError(
                f"domain folder {self.folders[domain]} has no image for split {name!r}: the splits "
                f"of class folders are train, val and test, and images end in {', '.join(SUFFIXES)}"
            )
        return folders.splits[name]

    def ignored(self) -> list[str]:
        """The files of class folders that are no images, in the domains read so far."""
        return [path for folders in self._class_folders.values() for path in folders.ignored]

    def class_folders(self, domain: str) -> ClassFolders:
        """The splits of a domain of class folders, read once."""
        if domain not in self._class_folders:
            folders = read_class_folders(self.folders[domain], domain)
            for note in folders.notes:
                self._note(note)
            self._class_folders[domain] = folders
        return self._class_folders[domain]

    def _rendered(self, domain, name):
        if name not in procedural.SPLITS:
            raise InputError(
                f"split {name!r} is not one of the procedural domains' splits: use train, val or "
                "test"
            )
        pixels, labels = procedural.render(domain, name)
        return Split(domain, name, labels, pixels=pixels)

    def _read(self, domain, name):
        entries = self.entries(domain, name)
        found = look_up(entries)
        for problem in missing_files(entries, found).values():
            if self.on_bad_image != "skip":
                raise InputError(
                    f"{problem} (domain {domain}, split {name}; {len(found.missing):,} of its "
                    f"{len(entries.paths):,} images): add it, or take it out of the data"
                )
        for problem in conflicts(entries, found):
            raise InputError(f"{problem} (domain {domain}, split {name}): give each file one label")
        repeated = len(entries.paths) - len(found.missing) - len(found.kept)
        if repeated:
            self._note(
                f"domain {domain}, split {name}: {repeated:,} entries repeat the file of another "
                "entry; each file counts once"
            )
        labels = [entries.labels[row] for row in found.kept]
        if all(len(ids) == 1 for ids in labels):
            labels = np.array(labels, dtype=np.int32).reshape(-1)
        return Split(
            *(domain, name, labels),
            paths=[found.paths[row] for row in found.kept],
            folder=entries.folder,
            files=found.files[found.kept],
            on_bad_image=self.on_bad_image,
            missing=missing_files(entries, found),
            label_names=None if self.manifests else self.class_folders(domain).classes,
        )

    def _note_shared(self, domain, name):
        """Notes the files and classes that training shares with another split."""
        train = self._splits.get((domain, "train"))
        others = [n for d, n in self._splits if d == domain]
        for other in others if name == "train" else [name]:
            if train is None or other in ("train", "all"):
                continue
            split = self._splits[domain, other]
            files = np.isin(split.files, train.files).sum()
            classes = len(_label_set(train) & _label_set(split))
            if files or classes:
                self._note(
                    f"domain {domain}: train and {other} share {files:,} files and {classes:,} "
                    "classes"
                )


def _label_set(split):
    several = isinstance(split.labels, list)
    return set(itertools.chain(*split.labels) if several else split.labels.tolist())


# Batches ------------------------------------------------------------------------------------------


def _decoded(split: Split, side: int, prepare: Callable) -> np.ndarray:
    """prepare(row) of all rows of a split: (N, 3, side, side) uint8, zeros for a bad image."""
    pixels = np.zeros((len(split), 3, side, side), dtype=np.uint8)

    def fill(row):
        try:
            pixels[row] = prepare(row)
        except InputError as error:
            split.skip(row, error)

    pool = ThreadPoolExecutor(processors())  # Pillow decodes without Python's global lock
    try:
        collections.deque(pool.map(fill, range(len(split))), maxlen=0)
    finally:
        pool.shutdown(cancel_futures=True)
    return pixels


class TrainBatches(Dataset):
    """batches[step, domain] -> images (B, 3, H, W) uint8, labels (B,) int64 in 0..C-1.

    A batch is a function of (seed, step, domain): its images, distinct where the domain has enough
    of them, and the crop and flip of each position. A bad image that is skipped is replaced by
    another one of the domain, a function of (seed, step, position).

    splits    {domain: Split}
    size      H = W
    min_area  None for the paper's crop, of a fixed size; or crops of an area drawn from
              min_area..1 of the image's and an aspect ratio of 3:4 to 4:3, limited to the image,
              and resized
    share     positions of the batch to return, where several processes divide it
    keep      keep the decoded images in memory, where they take at most MEMORY_LIMIT bytes
    in_memory whether they are kept
    """

    def __init__(
        self,
        splits: dict[str, Split],
        size: int,
        batch_size: int,
        seed: int,
        *,
        antialias: bool = True,
        interpolation: str = "bilinear",
        min_area: float | None = None,
        share: slice = slice(None),
        keep: bool = True,
    ):
        self.splits, self.size, self.batch_size, self.seed = splits, size, batch_size, seed
        self.share = share
        self.antialias, self.interpolation = antialias, interpolation
        self.min_area, self.side = min_area, train_side(size)
        needed = sum(len(split) for split in splits.values()) * 3 * self.side**2
        self.in_memory = keep and needed <= MEMORY_LIMIT
        self.pixels = None
        if self.in_memory:
            self.pixels = {
                domain: _decoded(split, self.side, functools.partial(self._prepared, split))
                for domain, split in splits.items()
            }

    def _prepared(self, split, row):
        """(3, R, R) uint8, R = train_side(size). A reduced image cannot be sampled without
        antialiasing as the full one is."""
        image, box = split.reduced_image(row, self.side if self.antialias else None)
        whole = prepare_train(image, self.size, self.antialias, box, self.interpolation)
        return whole.transpose(2, 0, 1)

    def _usable(self, domain, row, position_seed):
        """`row` and its image (3, R, R), or those of another row if the image is bad."""
        split = self.splits[domain]
        for usable in self.candidates(domain, row, position_seed):
            if self.in_memory:
                return usable, self.pixels[domain][usable]
            try:
                return usable, self._prepared(split, usable)
            except InputError as error:
                split.skip(usable, error)

    def candidates(self, domain: str, row: int, position_seed: tuple[int, ...]) -> Iterator[int]:
        """Yields `row`, then rows that may take its place; none of an image known to be bad."""
        split, rng = self.splits[domain], None
        while True:
            if row not in split.bad_rows:
                yield row
            rng = rng or np.random.default_rng(position_seed)
            row = rng.integers(len(split))

    def _boxes(self, rng, count):
        """lefts, tops, widths, heights (count,) of crops, in pixels of the (R, R) images."""
        size, side = self.size, self.side
        if self.min_area is None:
            widths = heights = np.full(count, size)
            lefts, tops = rng.integers(0, side - size + 1, (2, count))
        else:
            areas = rng.uniform(self.min_area, 1, count)
            aspects = (4 / 3) ** rng.uniform(-1, 1, count)
            widths, heights = np.minimum(side, side * np.sqrt([areas * aspects, areas / aspects]))
            lefts, tops = rng.random((2, count)) * (side - np.stack([widths, heights]))
        return list(zip(lefts, tops, widths, heights))

    def _crop(self, whole, box, flip):
        left, top, width, height = box
        if self.min_area is None:
            crop = whole[:, top : top + height, left : left + width]
        else:
            image = Image.fromarray(whole.transpose(1, 2, 0))
            corners = (left, top, left + width, top + height)
            crop = resize(image, self.size, self.size, True, corners, self.interpolation)
            crop = crop.transpose(2, 0, 1)
        return crop[:, :, ::-1] if flip else crop

    def crops(self, domain: str, row: int, count: int) -> np.ndarray:
        """(count, 3, H, W) uint8: random crops of one image, a function of (seed, row). Raises
        InputError for a bad image."""
        whole = self._prepared(self.splits[domain], row)
        rng = np.random.default_rng((self.seed, row))
        boxes, flips = self._boxes(rng, count), rng.random(count) < 0.5
        images = np.empty((count, 3, self.size, self.size), dtype=np.uint8)
        for i, (box, flip) in enumerate(zip(boxes, flips)):
            images[i] = self._crop(whole, box, flip)
        return images

    def __getitem__(self, key: tuple[int, str]) -> tuple[torch.Tensor, torch.Tensor]:
        step, domain = key
        split, batch = self.splits[domain], self.batch_size
        rng, rows = self.rows(step, domain)
        boxes = self._boxes(rng, batch)
        flips = rng.random(batch) < 0.5
        positions = range(batch)[self.share]
        images = np.empty((len(positions), 3, self.size, self.size), dtype=np.uint8)
        for i, position in enumerate(positions):
            position_seed = (self.seed, step, position)
            rows[position], whole = self._usable(domain, rows[position], position_seed)
            images[i] = self._crop(whole, boxes[position], flips[position])
        return torch.from_numpy(images), torch.from_numpy(split.classes[rows[self.share]])

    def rows(self, step: int, domain: str) -> tuple[np.random.Generator, np.ndarray]:
        """-> the generator of a batch, and the rows (B,) of the domain that it has drawn."""
        rng, count = np.random.default_rng((self.seed, step)), len(self.splits[domain])
        return rng, rng.choice(count, self.batch_size, replace=count < self.batch_size)

    def files(self, step: int, domain: str) -> list[str]:
        """The paths of a batch, or the names of images in memory."""
        split, positions = self.splits[domain], enumerate(self.rows(step, domain)[1])
        rows = [self._usable(domain, row, (self.seed, step, i))[0] for i, row in positions]
        return [split.path(i) for i in rows]


class TestImages(Dataset):
    """Images of a split, all or those of some ascending `rows`, as prepared for evaluation.

    images[places] -> (B, 3, size, size) uint8 for a slice, range or list. A bad image that is
    skipped is all zeros, and one of `split.bad_rows` from then on. With `keep`, all images of the
    split are kept decoded in memory.
    """

    __test__ = False  # pytest must not collect it because of its name

    def __init__(
        self,
        split: Split,
        size: int,
        *,
        antialias: bool = True,
        interpolation: str = "bilinear",
        keep: bool = False,
        rows: np.ndarray | None = None,
    ):
        self.split, self.size = split, size
        self.antialias, self.interpolation = antialias, interpolation
        self.splits = {split.domain: split}
        self.rows = np.arange(len(split)) if rows is None else rows
        self.pixels = _decoded(split, size, self._prepared) if keep else None

    def _prepared(self, row):
        """(3, size, size) uint8."""
        image, box = self.split.reduced_image(row, self.size if self.antialias else None)
        pixels = prepare_test(image, self.size, self.antialias, box, self.interpolation)
        return pixels.transpose(2, 0, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: slice | range | list[int]) -> torch.Tensor:
        rows = self.rows[places]
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[rows])
        images = np.zeros((len(rows), 3, self.size, self.size), dtype=np.uint8)
        for position, row in enumerate(rows.tolist()):
            try:
                images[position] = self._prepared(row)
            except InputError as error:
                self.split.skip(row, error)
        return torch.from_numpy(images)

    def batches(
        self, size: int, workers: int = 0, share: slice = slice(None)
    ) -> Iterator[torch.Tensor]:
        """Yields all images in order, (size, 3, H, W) uint8 each, the last batch perhaps smaller;
        of several processes, each takes its share of these batches.

        Images that are not in memory are decoded by up to `workers` processes.
        """
        rows = [slice(first, first + size) for first in range(0, len(self), size)][share]
        workers = 0 if self.pixels is not None else min(workers, len(rows) // 2)
        return (images for _, images in loaded(self, [rows], workers))

    def usable_rows(self) -> np.ndarray:
        """(M,) int64: the rows of images that are not bad, once all of them have been decoded."""
        return np.setdiff1d(self.rows, list(self.split.bad_rows))


class _Reports(Dataset):
    """The items of a dataset, each with what a worker process must tell its parent: (item, bad rows
    found by domain). An InputError is the item; raised, it would arrive as a traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        splits = self.dataset.splits
        known = {domain: len(split.bad_rows) for domain, split in splits.items()}
        try:
            item = self.dataset[key]
        except InputError as error:
            item = error
        return item, {d: list(s.bad_rows.items())[known[d] :] for d, s in splits.items()}


_open = weakref.WeakSet()  # generators whose processes may be running


@atexit.register
def _end_processes():
    """Python waits at exit for these processes, and they ignore the signal that should end them."""
    for items in list(_open):
        items.close()


def loaded(
    dataset: TrainBatches | TestImages, plans: Iterable[list], workers: int
) -> Iterator[tuple]:
    """Yields (key, dataset[key]) for all keys of all plans, in order.

    `workers` processes load the items of a plan ahead of time; 0 loads them in this process. A plan
    is taken from `plans` when all items of the previous one have been used. Raises what
    dataset[key] raises when its turn comes.
    """
    items = _loaded(dataset, plans, workers)
    _open.add(items)
    return items


def _loaded(dataset, plans, workers):
    keys = []
    loader = DataLoader(
        _Reports(dataset),
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
    )
    try:
        for plan in plans:
            keys[:] = plan
            for (item, bad_rows), key in zip(_guarded(loader), plan):
                for domain, found in bad_rows.items():
                    for row, reason in found:
                        dataset.splits[domain].skip(row, InputError(reason))
                if isinstance(item, InputError):
                    raise item
                yield key, item
    finally:  # ends the processes
        del loader


def _ignore_signals(worker):
    """Ctrl-C and batch systems signal all processes. The main process ends the others, when it has
    finished its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


WORKER_ENDED = (
    "a process that loads images has ended unexpectedly, perhaps for lack of memory: give fewer "
    "--workers, and rerun with --resume"
)


def worker_has_ended(error: RuntimeError) -> bool:
    """Whether an error says so; torch raises it wherever the program is."""
    return str(error).startswith("DataLoader worker")


def _guarded(loader):
    """The items of a loader. Raises InputError if a worker process has ended."""
    try:
        yield from loader
    except RuntimeError as error:
        if not worker_has_ended(error):
            raise
        raise InputError(WORKER_ENDED) from None


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


# python data.py check -----------------------------------------------------------------------------


def check(root: str | os.PathLike) -> dict:
    """Opens every image of a data directory -> what it holds and what is wrong, as plain values.

    domains   {domain: {split: {"images", "classes", "classes_of_one_image"}}}
    problems  sentences, each about a file, a manifest or a domain that cannot be used
    ignored   files in class folders that are no images of a class
    shared    [{"file": path, "splits": [...]}]: files that several splits name
    copies    [{path: [split, ...], ...}]: different files of the same content
    notes     as of Benchmark
    Raises InputError for a root that is no data directory.
    """
    benchmark = Benchmark(root)
    domains, problems = {}, []
    uses = {}  # {number of the file: (its path, the splits that name it)}
    for domain in benchmark.domains:
        domains[domain] = {}
        for name in benchmark.split_names(domain):
            try:
                entries = benchmark.entries(domain, name)
            except InputError as error:
                problems.append(str(error))
                continue
            found = look_up(entries)
            where = f"(domain {domain}, split {name})"
            wrong = [*missing_files(entries, found).values(), *conflicts(entries, found)]
            problems += [printable(f"{sentence} {where}") for sentence in wrong]
            domains[domain][name] = counts(entries, found)
            for row in found.kept:
                path = os.path.join(entries.folder, found.paths[row])
                _, names = uses.setdefault(int(found.files[row]), (path, []))
                names.append(f"{domain}/{name}")
    copies, unreadable = examine([path for path, _ in uses.values()])
    splits_of = dict(uses.values())
    return {
        "domains": domains,
        "problems": list(dict.fromkeys(problems + unreadable)),
        "ignored": benchmark.ignored(),
        "shared": [{"file": path, "splits": names} for path, names in uses.values() if names[1:]],
        "copies": [{path: splits_of[path] for path in group} for group in copies],
        "notes": benchmark.notes,
    }


def counts(entries: Entries, found: Files) -> dict[str, int]:
    """Numbers of images and classes of a split, each file counted once."""
    sizes = collections.Counter(label for row in found.kept for label in entries.labels[row])
    single = sum(size == 1 for size in sizes.values())
    return {"images": len(found.kept), "classes": len(sizes), "classes_of_one_image": single}


def examine(paths: list[str]) -> tuple[list[list[str]], list[str]]:
    """Opens images -> groups of files with the same content, sentences about unreadable files."""

    def digest(path):
        try:
            open_image(path)
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except InputError as error:
            return str(error)

    groups, unreadable = collections.defaultdict(list), []
    with ThreadPoolExecutor(processors()) as pool:
        for path, result in zip(paths, pool.map(digest, paths)):
            if isinstance(result, str):
                unreadable.append(result)
            else:
                groups[result].append(path)
    return [group for group in groups.values() if len(group) > 1], unreadable


def report_lines(report: dict) -> Iterator[str]:
    """The report of `check` as text."""
    yield f"{'domain':24}{'split':12}{'images':>10}{'classes':>10}{'of one image':>14}"
    for domain, splits in report["domains"].items():
        for name, row in splits.items():
            numbers = f"{row['images']:10,}{row['classes']:10,}{row['classes_of_one_image']:14,}"
            yield f"{domain:24}{name:12}{numbers}"
    yield from (f"note: {note}" for note in report["notes"])
    yield from (f"ignored: {path}" for path in report["ignored"])
    together = collections.Counter(", ".join(x["splits"]) for x in report["shared"])
    yield from (f"note: {count:,} files are shared by {s}" for s, count in together.items())
    for group in report["copies"]:
        files = (f"{path} ({', '.join(names)})" for path, names in group.items())
        yield f"note: same content: {', '.join(files)}"
    yield from (f"problem: {sentence}" for sentence in report["problems"])
    yield f"{len(report['problems']):,} problems"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="data.py", description="Checks a data directory.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = (
        "Opens every image of a data directory. Prints, for each domain and split, the numbers of "
        "images, of classes, and of classes with one image, and lists files that are missing, "
        "unreadable, truncated, too large or ignored, contradicting labels, files that splits "
        "share, and copies. Exit status: 0 if all can be used, 1 if there are problems, 2 for a "
        "command that cannot be run."
    )
    checker = commands.add_parser("check", help="opens every image", description=text)
    checker.add_argument("data", metavar="DIR", help="data directory, as for udon.py train --data")
    checker.add_argument("--json", metavar="FILE", help="write the complete report to this file")
    with parser.sentences():
        options = parser.parse_args(arguments)
        if options.json:
            open(options.json, "a").close()  # before the long work
        report = check(options.data)
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
        for line in report_lines(report):
            print(printable(line))
    sys.exit(1 if report["problems"] else 0)


if __name__ == "__main__":
    main()
