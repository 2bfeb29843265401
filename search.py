"""Search pictures with a trained student: embed a directory once, then find and label photos.

    python search.py embed CKPT DIR --out photos.npz
    python search.py find  CKPT photos.npz PHOTO ... [--top 10] [--html page.html]
    python search.py label CKPT photos.npz PHOTO ... [--top 10]

    Embedder(path).embed(pictures)         -> (N, S) float32 unit rows; paths, PIL images or arrays
    open_index(path, embedder)             -> Index, the contents of photos.npz
    nearest(index, vectors, files, top)    -> [[(similarity, row), ...], ...]
    vote(index, neighbours)                -> (domain, class, similarity, share)

CKPT is a run, a checkpoint or an exported student: weights/student.pt before you train your own.
PHOTO is a file or a directory. Where the index holds a photo's own file, under any name, that is
left out of its result.

A folder of pictures in DIR is a class, a folder of such folders a domain; a DIR in the UnED layout
has the domains and classes of its manifests (details: folders.list_pictures).

photos.npz, for numpy.load: `vectors` (N, S) float32 unit rows; `paths` below the folder, `domains`
and `classes`, (N,) bytes, which os.fsdecode turns into text, empty where there is none; `about`,
JSON with "folder", which is DIR, or DIR/images in the UnED layout, "checkpoint", "digest" of the
student and its preprocessing, "preprocessing" and "image_size". evaluate.py --embeddings reads it,
too. The search is exact. For an approximate one, hand the vectors to faiss:

    vectors = numpy.load("photos.npz")["vectors"]
    index = faiss.index_factory(vectors.shape[1], "HNSW32", faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    similarities, rows = index.search(Embedder("weights/student.pt").embed(["photo.jpg"]), 10)

Copy with: checkpoint, data, distributed, export, folders, gallery, images, kernels/, model,
procedural, timm_backbone, torch, numpy, pillow.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

import checkpoint
import data
from folders import list_pictures
from gallery import safe, thumbnail
from images import InputError, as_shown, normalise, open_reduced, prepare_test, printable, resizing
from kernels import cosine_topk

BATCH = 128  # fixed: the last digits of an embedding depend on the shape of its batch
PART = 32 * BATCH  # pictures of a part of an index, kept on disk until all are embedded
CHUNK = 8 * BATCH  # photos searched at a time
THUMBNAIL = 320  # pixels, for screens of twice the density
TEMPERATURE = 0.05  # of the vote: a neighbour less similar by this has 1/e of the weight

Picture = str | os.PathLike | Image.Image | np.ndarray


class Embedder:
    """The student of a checkpoint, ready for pictures.

    path      a checkpoint, an exported student, or the directory of a run
    device    "auto": a GPU where there is one
    backbone  the module of a run that was trained with one of its own
    Attributes: `model`, `width`, S; `size`, the side of its images; `preprocessing`, {"mean",
    "std", "interpolation", "antialias"}; `digest` of all these and the weights.
    Raises checkpoint.CheckpointError for a file that cannot be used, InputError for a device.
    """

    def __init__(
        self, path: str | os.PathLike, device: str = "auto", backbone: nn.Module | None = None
    ):
        self.path, self.device = Path(path), data.usable_device(device)
        self.model, contents = checkpoint.load(path, self.device, backbone)
        checkpoint.check_student(path, contents)
        self.preprocessing = contents["preprocessing"]
        self.width = contents["architecture"]["student_dim"]
        self.size = contents["architecture"]["backbone"]["image_size"]
        about = [contents["architecture"]["backbone"], self.preprocessing]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            if name.startswith(checkpoint.STUDENT):
                digest.update(name.encode() + weight.cpu().numpy().tobytes())
        self.digest = digest.hexdigest()

    def embed(self, pictures: Iterable[Picture] | Picture) -> np.ndarray:
        """Files, PIL images or (H, W, 3) uint8 arrays, or one of them -> (N, S) float32 unit rows.
        Raises InputError for a picture that cannot be read."""
        single = isinstance(pictures, (str, os.PathLike, Image.Image))
        pictures = [pictures] if single else list(pictures)
        vectors, bad = collected(self.batches(pictures), self.width)
        for row, reason in bad.items():
            raise InputError(f"{reason} (picture {row})")
        return vectors

    def images(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """The input of the model: (N, 3, size, size) float32, normalised."""
        pixels = torch.from_numpy(np.stack([self._prepared(picture) for picture in pictures]))
        return normalise(pixels, self.preprocessing["mean"], self.preprocessing["std"])

    def batches(self, pictures: Sequence[Picture]) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
        """Yields (vectors (B, S), {position: reason} of pictures that cannot be read), B = 128."""
        mean, std = self.preprocessing["mean"], self.preprocessing["std"]
        for futures in self._ahead(pictures):
            pixels = np.zeros((len(futures), 3, self.size, self.size), dtype=np.uint8)
            bad = {}
            for i, future in enumerate(futures):
                try:
                    pixels[i] = future.result()
                except InputError as error:
                    bad[i] = str(error)
            with torch.inference_mode():
                images = normalise(torch.from_numpy(pixels).to(self.device), mean, std)
                vectors = self.model.embed(images).float().cpu().numpy()
            if not np.isfinite(vectors).all():
                raise InputError(f"embeddings of {self.path} are not finite: its run has diverged")
            yield vectors, bad

    def _ahead(self, pictures):
        """Yields the futures of each batch; the next one is prepared by threads meanwhile."""
        pool, ahead = ThreadPoolExecutor(data.processors()), collections.deque()
        try:
            for top in range(0, len(pictures), BATCH):
                batch = pictures[top : top + BATCH]
                ahead.append([pool.submit(self._prepared, picture) for picture in batch])
                if len(ahead) > 1:
                    yield ahead.popleft()
            yield from ahead
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepared(self, picture):
        """(3, size, size) uint8."""
        how, box = resizing(self.preprocessing), None
        if isinstance(picture, (str, os.PathLike)):
            picture, box = open_reduced(picture, self.size if how["antialias"] else None)
        elif isinstance(picture, Image.Image):
            picture = as_shown(picture)
        else:
            pixels = np.asarray(picture)
            if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,) or not pixels.size:
                raise InputError(
                    f"a picture is an array {pixels.shape} of {pixels.dtype}: give (H, W, 3) uint8 "
                    "in RGB, a PIL image or a file"
                )
            picture = Image.fromarray(pixels)
        return prepare_test(picture, self.size, box=box, **how).transpose(2, 0, 1)


def collected(batches, width) -> tuple[np.ndarray, dict[int, str]]:
    """All of Embedder.batches."""
    parts, bad, count = [np.empty((0, width), np.float32)], {}, 0
    for vectors, reasons in batches:
        bad |= {count + i: reason for i, reason in reasons.items()}
        parts.append(vectors)
        count += len(vectors)
    return np.concatenate(parts), bad


# The index ----------------------------------------------------------------------------------------


class Index(NamedTuple):
    """What photos.npz holds."""

    vectors: np.ndarray  # (N, S) float32
    paths: np.ndarray  # (N,) bytes, as the next two
    domains: np.ndarray
    classes: np.ndarray
    folder: str

    def file(self, row: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.paths[row]))

    def labels(self, row: int) -> tuple[str, str]:
        return os.fsdecode(self.domains[row]), os.fsdecode(self.classes[row])


def embed(options: argparse.Namespace) -> None:
    """Writes the index of a directory; pictures embedded before an interruption are kept."""
    out = Path(options.out)
    if not out.absolute().parent.is_dir() or (out.exists() and not is_index(out)):
        raise InputError(
            f"--out {out} must be a new file, or an index to replace, in a directory that exists"
        )
    embedder = Embedder(options.checkpoint, options.device)
    listing = list_pictures(options.directory)
    folder = os.path.realpath(listing.folder)
    if listing.note:
        print(f"note: {listing.note}")
    parts = Path(f"{out}.parts")
    parts.mkdir(exist_ok=True)
    progress, vectors, bad = Progress(len(listing.paths)), [], {}
    for top in range(0, len(listing.paths), PART):
        files = [os.path.join(folder, path) for path in listing.paths[top : top + PART]]
        part, reasons = embedded_part(embedder, files, parts / f"{top}.npz", progress)
        vectors.append(part)
        bad |= {top + i: reason for i, reason in reasons}
        if bad and options.on_bad_image == "stop":
            raise InputError(f"{bad[min(bad)]}; or leave it out with --on-bad-image skip")
    kept = [row for row in range(len(listing.paths)) if row not in bad]
    if not kept:
        raise InputError(f"none of {len(bad):,} pictures can be read; the first: {bad[0]}")
    about = {"folder": folder, "checkpoint": str(embedder.path), "digest": embedder.digest}
    about |= {"preprocessing": embedder.preprocessing, "image_size": embedder.size}
    names = {
        name: np.array([os.fsencode(getattr(listing, name)[row]) for row in kept])
        for name in Index._fields[1:4]
    }
    vectors = np.concatenate(vectors)[kept]
    with checkpoint.replacing(out) as partial, open(partial, "wb") as file:
        np.savez(file, vectors=vectors, about=np.array(json.dumps(about)), **names)
    for file in parts.glob("*.npz*"):
        file.unlink()
    with contextlib.suppress(OSError):  # holds files of others
        parts.rmdir()
    for reason in bad.values():
        print(f"left out: {reason}")
    classes = len({pair for pair in zip(names["domains"], names["classes"]) if pair[1]})
    print(
        f"{out}: {len(kept):,} pictures of {classes:,} classes, {len(bad):,} left out; vectors of "
        f"{embedder.width} numbers by {embedder.path}"
    )


def is_index(path: Path) -> bool:
    """Whether a file may be replaced by an index."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "vectors.npy" in archive.namelist()


def embedded_part(embedder, files, path, progress) -> tuple[np.ndarray, list]:
    """vectors and [(position, reason)] of some files, from `path` if it is of the same ones."""
    digest = hashlib.sha256(embedder.digest.encode())
    for file in files:
        try:
            state = os.stat(file)
            digest.update(f"{state.st_size} {state.st_mtime_ns} {ascii(file)}".encode())
        except OSError:
            digest.update(ascii(file).encode())
    key = digest.hexdigest()
    try:
        with np.load(path, allow_pickle=False) as part:
            if str(part["key"]) == key:
                progress.skip(len(files))
                return part["vectors"], json.loads(str(part["bad"]))
    except Exception:  # missing or damaged: numpy and zipfile share no class of errors
        pass
    vectors, bad = collected(progress.through(embedder.batches(files)), embedder.width)
    with checkpoint.replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, key=key, vectors=vectors, bad=np.array(json.dumps([*bad.items()])))
    return vectors, [*bad.items()]


class Progress:
    """Prints the number of pictures embedded, the rate and the time left every five seconds."""

    def __init__(self, total: int):
        self.total, self.done, self.skipped = total, 0, 0
        self.started = self.printed = time.perf_counter()

    def skip(self, count: int) -> None:
        self.done += count
        self.skipped += count
        print(f"{self.done:,} of {self.total:,} pictures, embedded before the interruption")

    def through(self, batches):
        for vectors, bad in batches:
            yield vectors, bad
            self.done += len(vectors)
            now = time.perf_counter()
            if now - self.printed >= 5 or self.done == self.total:
                rate = (self.done - self.skipped) / (now - self.started)
                left = int((self.total - self.done) / rate)
                clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
                text = f"{self.done:,} of {self.total:,} pictures   {rate:,.0f} images/s"
                print(f"{text}   {clock} left", flush=True)
                self.printed = now


def open_index(path: str | os.PathLike, embedder: Embedder) -> Index:
    """Reads an index. Raises InputError if it is missing, damaged or of another student."""
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError("it does not exist")
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            index = Index(*(file[name] for name in Index._fields[:4]), about["folder"])
            digest, source = about["digest"], about["checkpoint"]
        count = len(index.vectors)
        fits = count and index.vectors.shape == (count, embedder.width)
        fits &= index.vectors.dtype == np.float32 and isinstance(index.folder, str)
        if not fits or any(x.shape != (count,) or x.dtype.kind != "S" for x in index[1:4]):
            raise ValueError("its arrays are of other shapes or types")
    except MemoryError:
        raise
    except Exception as error:  # numpy, zipfile and json share no class of errors
        raise InputError(
            f"index {path} cannot be read ({checkpoint.summary(error)}): make it with python "
            "search.py embed"
        ) from None
    if digest != embedder.digest:
        raise InputError(
            f"index {path} was made with another checkpoint, {source} ({str(digest)[:8]}), than "
            f"{embedder.path} ({embedder.digest[:8]}): give that one, or embed the pictures again"
        )
    return index


# Neighbours ---------------------------------------------------------------------------------------


def nearest(
    index: Index, vectors: np.ndarray, files: Sequence[str], top: int
) -> list[list[tuple[float, int]]]:
    """The `top` rows nearest to each of the vectors (Q, S), or all: [(similarity, row), ...], in
    descending order. Rows of a query's own file, one of `files`, are left out."""
    own, width = [identity(file) for file in files], top + 1
    while True:
        k = min(width, len(index.vectors))
        try:
            scores, rows = cosine_topk(vectors, index.vectors, k)
        except ValueError as error:
            raise InputError(f"the index cannot be searched: {error}") from None
        found = [
            [(s, row) for s, row in zip(*both) if me is None or identity(index.file(row)) != me]
            for me, *both in zip(own, scores.tolist(), rows.tolist())
        ]
        if k == len(index.vectors) or min(map(len, found), default=top) >= top:
            return [neighbours[:top] for neighbours in found]
        width *= 2


def identity(path: str) -> tuple[int, int] | None:
    """Equal for all names of one file; None if there is none."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino


def vote(index: Index, neighbours: list[tuple[float, int]]) -> tuple[str, str, float, float]:
    """The class with the most weight among neighbours -> domain, class, the similarity of its
    nearest picture, and its share of the weight, exp(similarity / TEMPERATURE)."""
    weights, similarities = collections.Counter(), {}
    for similarity, row in neighbours:
        labels = index.labels(row)
        weights[labels] += np.exp((similarity - neighbours[0][0]) / TEMPERATURE)
        similarities.setdefault(labels, similarity)
    (labels, weight), *_ = weights.most_common(1)
    return *labels, similarities[labels], weight / weights.total()


def neighbours_of(options: argparse.Namespace, with_classes: bool = False):
    """Yields (index, photo, its neighbours) for all photos of a command line. The index is that of
    the pictures with a class, if only these are asked for."""
    if options.top < 1:
        raise InputError(f"--top is {options.top}: give 1 or more")
    embedder = Embedder(options.checkpoint, options.device)
    index = open_index(options.index, embedder)
    if with_classes:
        rows = np.flatnonzero(index.classes != b"")
        if not len(rows):
            raise InputError(
                f"index {options.index} has no classes: put its pictures in a folder per class, "
                "and embed them again"
            )
        if len(rows) < len(index.vectors):
            index = Index(*(values[rows] for values in index[:4]), index.folder)
    if options.top > len(index.vectors):
        note = f"note: --top is {options.top}, the index has {len(index.vectors):,} pictures"
        print(note, file=sys.stderr)
    photos, bad, count = list(photos_of(options.photos)), {}, 0
    for top in range(0, len(photos), CHUNK):
        some = photos[top : top + CHUNK]
        vectors, bad = collected(embedder.batches(some), embedder.width)
        kept = [i for i in range(len(some)) if i not in bad]
        for reason in bad.values():
            if options.on_bad_image == "stop" or len(photos) == 1:
                raise InputError(reason)
            print(f"left out: {reason}", file=sys.stderr)
        if kept:
            files = [some[i] for i in kept]
            found = nearest(index, vectors[kept], files, options.top)
            yield from ((index, *pair) for pair in zip(files, found))
            count += len(kept)
    if not count:
        raise InputError(f"none of {len(photos):,} photos can be read")


def photos_of(arguments):
    for argument in arguments:
        if os.path.isdir(argument):
            listing = list_pictures(argument)
            yield from (os.path.join(listing.folder, path) for path in listing.paths)
        else:
            yield argument


# Output -------------------------------------------------------------------------------------------


def line(*cells: object) -> str:
    """A line of tab-separated cells; control characters and undecodable bytes are escaped."""
    return "\t".join(f"{x:.4f}" if isinstance(x, float) else printable(str(x)) for x in cells)


def find(options: argparse.Namespace) -> None:
    sections = []
    for index, photo, neighbours in neighbours_of(options):
        if not sections:
            print(line("photo", "rank", "similarity", "path", "domain", "class"))
        sections.append(section(index, photo, neighbours) if options.html else "")
        for rank, (similarity, row) in enumerate(neighbours, 1):
            path = os.fsdecode(index.paths[row])
            print(line(photo, rank, similarity, path, *index.labels(row)))
    if options.html:
        checkpoint.write_text(options.html, PAGE.format(sections="\n".join(sections)))


def label(options: argparse.Namespace) -> None:
    header = line("path", "domain", "class", "similarity", "votes")
    for index, photo, neighbours in neighbours_of(options, with_classes=True):
        if not neighbours:
            reason = "the index has no other picture with a class"
            print(printable(f"left out: {photo}: {reason}"), file=sys.stderr)
            continue
        if header:
            print(header)
        header = None
        print(line(photo, *vote(index, neighbours)))


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Nearest pictures</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 24px }}
h2 {{ font-size: 16px; margin: 32px 0 8px; overflow-wrap: anywhere }}
section {{ display: flex; flex-wrap: wrap; gap: 16px }}
figure {{ width: 160px; margin: 0 }}
figure:first-child {{ border-right: 2px solid gray; padding-right: 16px }}
img, .missing {{ width: 160px; height: 160px; object-fit: contain; background: #8882 }}
img {{ display: block }}
.missing {{ display: grid; place-items: center }}
figcaption {{ margin-top: 4px; overflow-wrap: anywhere }}
small {{ display: block; opacity: 0.7 }}
</style>
{sections}
</html>
"""


def section(index: Index, photo: str, neighbours: list[tuple[float, int]]) -> str:
    """A photo and its neighbours in HTML."""
    figures = [figure(photo, "photo")]
    for rank, (similarity, row) in enumerate(neighbours, 1):
        names = " / ".join(filter(None, index.labels(row)))
        path = os.fsdecode(index.paths[row])
        figures.append(figure(index.file(row), f"{rank}. {similarity:.3f}", names, path))
    return f"<h2>{safe(photo)}</h2>\n<section>\n" + "\n".join(figures) + "\n</section>"


def figure(file: str, title: str, names: str = "", path: str = "") -> str:
    try:
        pixels = thumbnail(open_reduced(file, THUMBNAIL)[0], THUMBNAIL)
        image = f'<img alt="{safe(path or file)}" src="{pixels}">'
    except InputError:
        image = '<div class="missing">cannot be read</div>'
    caption = f"<b>{title}</b><br>{safe(names)}<small>{safe(path)}</small>"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


OWN = "A photo's own file is left out where the index holds it."
COMMANDS = {
    "embed": (
        "embeds all pictures of a directory into an index",
        "After an interruption, the same command resumes. A folder of pictures is a class, a "
        "folder of such folders a domain.",
    ),
    "find": ("prints the pictures of an index that are most similar to photos", OWN),
    "label": ("prints the class of photos, by a vote of the most similar pictures", OWN),
}


def command_line() -> data.Parser:
    parser = data.Parser(prog="search.py", description="Searches pictures with a trained student.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, more) in COMMANDS.items():
        description = f"{text[0].upper()}{text[1:]}. {more}"
        command = commands.add_parser(name, help=text, description=description)
        command.add_argument("checkpoint", metavar="CKPT", help="a run, best.pt or student.pt")
        if name == "embed":
            command.add_argument("directory", metavar="DIR", help="pictures, at any depth")
            command.add_argument("--out", metavar="FILE", required=True, help="such as photos.npz")
        else:
            command.add_argument("index", metavar="INDEX", help="photos.npz, as embed wrote it")
            command.add_argument("photos", metavar="PHOTO", nargs="+", help="file or directory")
            command.add_argument("--top", type=int, default=10, help="neighbours (default: 10)")
        if name == "find":
            command.add_argument("--html", metavar="FILE", help="also write a page with thumbnails")
        command.add_argument(
            "--on-bad-image",
            choices=("skip", "stop"),
            default="skip",
            help="leave out a picture that cannot be read and list it, or stop (default: skip)",
        )
        command.add_argument("--device", default="auto", help="(default: cuda where there is one)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    with parser.sentences((checkpoint.CheckpointError,)):
        options = parser.parse_args(arguments)
        {"embed": embed, "find": find, "label": label}[options.command](options)


if __name__ == "__main__":
    main()
