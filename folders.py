"""What a data directory holds: manifests, class folders, and the files that they name.

    read_manifest(file, folder, single)    -> Entries: the paths and labels of a split
    read_class_folders(folder, domain)     -> ClassFolders: the Entries of all splits
    images_below(folder, child, ignored)   -> the paths of all images in a directory tree
    list_pictures(folder)                  -> Listing: all pictures of a directory, for search.py
    look_up(entries)                       -> Files: what the paths name on disk

Names beginning with "." and __MACOSX are skipped. Paths are str as of os.fsdecode, so that any
bytes that a file system allows in a name are possible.
Copy with: images, torch, numpy, pillow.
"""

import collections
import functools
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from images import SUFFIXES, InputError

SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Entries(NamedTuple):
    """The images of a split as its manifest or directories list them."""

    folder: str
    paths: list[str]  # below folder
    labels: list[tuple[int, ...]]


class ClassFolders(NamedTuple):
    """What a domain of class folders holds."""

    splits: dict[str, Entries]
    classes: list[str]  # names, by label
    ignored: list[str]  # files in visible folders that are no images of a class
    notes: list[str]


# Manifests and class folders ----------------------------------------------------------------------


def read_manifest(file: Path, folder: str, single: bool) -> Entries:
    """The entries of a manifest of the UnED layout; `single` requires one class per image.

    Raises InputError for a file that is missing or not of this form.
    """
    try:
        if not file.is_file() and file.exists():
            raise InputError(f"manifest {file} is not a regular file: replace it")
        text = file.read_text(encoding="utf-8-sig")
        entries = json.loads(text, object_pairs_hook=_without_repetition)
    except OSError as error:
        raise InputError(
            f"manifest {file} cannot be opened ({error.strerror}): each domain needs train, val "
            "and test"
        ) from None
    except InputError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            f"manifest {file} is not JSON ({reason}): write a list of objects with path and "
            "class_id"
        ) from None
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"manifest {file} holds no list of images: write a list of objects with path and "
            "class_id"
        )
    paths, labels = [], []
    for row, entry in enumerate(entries):
        path, ids = _path_and_labels(entry)
        if path is None:
            raise InputError(
                f"manifest {file} has {str(entry)[:120]} at entry {row}: it needs a path in valid "
                "Unicode, and a class_id that is an integer from 0 to 2^31 - 1 or a list of such"
            )
        if single and isinstance(entry["class_id"], list):
            raise InputError(
                f"manifest {file} has the classes {str(entry['class_id'])[:120]} at entry {row}: a "
                "training image has one class_id, an integer; lists are for queries"
            )
        paths.append(path)
        labels.append(ids)
    return Entries(folder, paths, labels)


def _without_repetition(pairs):
    """A JSON object as a dict. Raises ValueError for a key that it holds twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"a key is repeated in {str(pairs)[:120]}")
    return result


def _path_and_labels(entry):
    """The path and the classes of a manifest's entry; None, None for an invalid one."""
    if not isinstance(entry, dict):
        return None, None
    path, ids = entry.get("path"), entry.get("class_id")
    ids = tuple(ids) if isinstance(ids, list) else (ids,)
    valid = ids and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    if not valid or not isinstance(path, str) or "\0" in path:
        return None, None
    try:
        path.encode()
        os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair; no name on this system
        return None, None
    return path, ids


def read_class_folders(folder: Path, domain: str) -> ClassFolders:
    """The splits of a domain of class folders.

    Where its folders are named after splits, these are used; otherwise, the classes are divided at
    random. Raises InputError for fewer than three classes and for folders that mix the two.
    """
    splits, ignored, notes = split_folders(folder), [], []
    ignored += visible_files(folder)
    parts = {}  # {split: {class: paths below folder}}
    for name, child in (splits or {"all": "."}).items():
        classes = visible_directories(folder / child)
        parts[name] = {c: images_below(folder, os.path.join(child, c), ignored) for c in classes}
        if splits:
            ignored += [os.path.join(child, x) for x in visible_files(folder / child)]
    classes = sorted(set().union(*parts.values()))
    if len(classes) < 3:
        is_class = not splits and any(map(is_image, ignored))
        raise InputError(
            f"domain folder {folder} has {len(classes)} class folders: give at least 3, since the "
            "splits need classes of their own"
            + (f"; it holds images, so if {folder.parent} is a domain, give its parent" * is_class)
        )
    if "test" not in parts and splits:
        parts["test"] = parts.pop("val")
        notes.append(f"{folder} has no test folder: {splits['val']} is the test split")
    if "all" in parts:
        val, test, train = _divided(parts["all"], domain, 0.1, 0.3)
        parts = {"train": train, "val": val, "test": test}
    elif "val" not in parts:
        parts["val"], parts["train"] = _divided(parts["train"], domain, 0.1)
        notes.append(
            f"{folder} has no val folder: a tenth of the training classes is the val split"
        )
    numbers = {c: number for number, c in enumerate(classes)}
    entries = {}
    for name, images in parts.items():
        paths = [path for c in sorted(images) for path in images[c]]
        labels = [(numbers[c],) for c in sorted(images) for _ in images[c]]
        entries[name] = Entries(str(folder), paths, labels)
    if ignored:
        notes.append(f"{folder}: ignored {by_suffix(ignored)}")
    ignored = [os.path.join(folder, path) for path in sorted(ignored)]
    return ClassFolders(entries, classes, ignored, notes)


def split_folders(folder: Path) -> dict[str, str]:
    """{split: folder name} where the folders are train and val or test, in any case; else {}.

    Raises InputError where there are other folders beside them.
    """
    names = visible_directories(folder)
    splits = {SPLIT_FOLDERS.get(name.lower()): name for name in names}
    splits.pop(None, None)
    if "train" not in splits or len(splits) < 2:
        return {}
    others = sorted(set(names) - set(splits.values()))
    if others:
        raise InputError(
            f"folder {folder} has split folders ({', '.join(splits.values())}) and others "
            f"({', '.join(others)[:120]}): keep one folder per split, or class folders alone"
        )
    return splits


def _divided(classes, domain, *shares):
    """Divides {class: paths} at random, but always in the same way: parts of the given shares, at
    least one class each, and the rest."""
    names = sorted(classes)  # sorted names often go by kind, hence the permutation
    order = np.random.default_rng(zlib.crc32(os.fsencode(domain))).permutation(len(names))
    sizes = [max(1, round(share * len(names))) for share in shares]
    parts = np.split(order, np.cumsum(sizes))
    return [{names[i]: classes[names[i]] for i in part} for part in parts]


def images_below(folder: str | os.PathLike, child: str, ignored: list[str]) -> list[str]:
    """The sorted paths below `folder` of all images in its folder `child`, at any depth. Other
    files are added to `ignored`."""
    paths, visited = [], set()
    for directory, children, names in os.walk(
        os.path.join(folder, child), onerror=_refuse, followlinks=True
    ):
        real = os.path.realpath(directory)
        if real in visited:  # a link back
            children.clear()
            continue
        visited.add(real)
        children[:] = filter(_is_visible, children)
        below = os.path.relpath(directory, folder)
        for name in filter(_is_visible, names):
            (paths if is_image(name) else ignored).append(os.path.normpath(f"{below}/{name}"))
    return sorted(paths)


def is_image(name: str) -> bool:
    """Whether a file's suffix is that of an image format that can be opened."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _is_visible(name):
    return not name.startswith(".") and name != "__MACOSX"


def visible_directories(folder: str | os.PathLike) -> list[str]:
    """The sorted names of the folders in a folder, without those that are skipped."""
    return _visible_names(folder, os.path.isdir)


def visible_files(folder: str | os.PathLike) -> list[str]:
    """The sorted names of the regular files in a folder, without those that are skipped."""
    return _visible_names(folder, os.path.isfile)


def _visible_names(folder, kind):
    try:
        names = os.listdir(folder)
    except OSError as error:
        _refuse(error)
    return sorted(x for x in names if _is_visible(x) and kind(os.path.join(folder, x)))


def _refuse(error):
    raise InputError(
        f"folder {error.filename} cannot be listed ({error.strerror}): change its permissions or "
        "take it out of the data"
    )


def by_suffix(paths: list[str]) -> str:
    """The numbers of files of each suffix, for example 75 .heic, 1 .db."""
    suffixes = [os.path.splitext(path)[1].lower() or "without suffix" for path in paths]
    counts = collections.Counter(suffixes).most_common()
    text = ", ".join(f"{count:,} {suffix}" for suffix, count in counts[:10])
    rest = sum(count for _, count in counts[10:])
    return text + (f", {rest:,} others" if rest else "")


# Any directory -----------------------------------------------------------------------------------


class Listing(NamedTuple):
    """Pictures in the order of their paths; a domain or class is "" where there is none."""

    folder: str
    paths: list[str]  # below folder
    domains: list[str]
    classes: list[str]
    note: str = ""  # what was ignored


def list_pictures(folder: str | os.PathLike) -> Listing:
    """The pictures of a directory, at any depth, with their domains and classes.

    In the UnED layout, these and the paths below images/ are those of the manifests. Otherwise, a
    folder in the directory that holds pictures itself is a class; one that holds folders alone is a
    domain, and these are its classes. Deeper folders are passed over, and so are split folders:
    train, val and test in the directory, or in a domain. Raises InputError for a directory without
    pictures.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is no directory: give one with pictures")
    if os.path.isdir(os.path.join(folder, "info_files")):
        return _manifest_pictures(Path(folder))
    ignored = []
    paths = images_below(folder, "", ignored)
    if not paths:
        raise InputError(f"{folder} holds no picture: pictures end in {', '.join(SUFFIXES)}")
    places = [path.split(os.sep)[:-1] for path in paths]
    classes = {place[0] for place in places if len(place) == 1}

    @functools.cache
    def has_splits(child):
        try:
            return bool(split_folders(Path(folder, child)))
        except InputError:  # beside other folders, these are names like any
            return False

    def labels(place):
        if has_splits(""):
            return "", "".join(place[1:2])
        if not place:
            return "", ""
        if has_splits(place[0]):
            return place[0], "".join(place[2:3])
        return ("", place[0]) if place[0] in classes else (place[0], place[1])

    note = f"ignored {by_suffix(ignored)}" if ignored else ""
    return Listing(str(folder), paths, *map(list, zip(*map(labels, places))), note)


def _manifest_pictures(root):
    """The Listing of all manifests; a picture in several of them has the labels of the first."""
    folder, found = str(root / "images"), {}
    for domain in visible_directories(root / "info_files"):
        for name in visible_files(root / "info_files" / domain):
            if name.endswith(".json"):
                file = root / "info_files" / domain / name
                entries = read_manifest(file, folder, single=False)
                for path, labels in zip(look_up(entries).paths, entries.labels):
                    names = domain, "/".join(map(str, labels))
                    found.setdefault(os.path.normpath(path), names)
    if not found:
        raise InputError(f"{root / 'info_files'} lists no picture: add <domain>/<split>.json")
    paths = sorted(found)
    return Listing(folder, paths, *map(list, zip(*map(found.get, paths))))


# Which files the paths name -----------------------------------------------------------------------


class Files(NamedTuple):
    """What the paths of Entries name on disk."""

    paths: list[str]  # as they are spelt on disk
    files: np.ndarray  # (N,) int64: equal numbers for the same file
    missing: dict[int, str]  # {row: reason} of paths that name no file
    kept: list[int]  # rows without those, and without repetitions of a file
    conflicts: list[tuple[int, int]]  # pairs of rows that give one file different labels


def look_up(entries: Entries) -> Files:
    """Finds the files of all entries, in linear time. Every directory is listed once, instead of
    asking for each of millions of files."""
    paths = list(entries.paths)
    files, inodes = np.zeros(len(paths), dtype=np.int64), np.zeros(len(paths), dtype=np.uint64)
    missing = dict.fromkeys(range(len(paths)), "does not exist")
    for spelling in (str, _escaped, _with_slashes):
        candidates = {row: spelling(entries.paths[row]) for row in missing}
        if spelling is not str:
            candidates = {row: x for row, x in candidates.items() if x != entries.paths[row]}
        for row, file, inode, reason in _listed(entries.folder, candidates):
            if reason is None:
                paths[row], files[row], inodes[row] = candidates[row], hash(file), inode
                del missing[row]
            else:
                missing[row] = reason
    _number_hard_links(entries.folder, paths, files, inodes, missing)
    first, kept, conflicts = {}, [], []
    for row, file in enumerate(files.tolist()):
        if row in missing:
            continue
        other = first.setdefault(file, row)
        if other == row:
            kept.append(row)
        elif set(entries.labels[other]) != set(entries.labels[row]):
            conflicts.append((other, row))
    return Files(paths, files, missing, kept, conflicts)


def _escaped(path):
    """Some archives store names as #Uxxxx where the manifest has the character itself."""
    return "".join(c if ord(c) < 128 else f"#U{ord(c):04x}" for c in path)


def _with_slashes(path):
    """A path that was written on Windows."""
    return path.replace("\\", "/")


def _listed(folder, paths: dict[int, str]):
    """Yields (row, real path, inode, None) for paths that name regular files, and (row, None, None,
    reason) for those that name something else."""
    directories = collections.defaultdict(list)
    for row, path in paths.items():
        directory, name = os.path.split(path)
        directories[directory].append((row, name))
    for directory, rows in directories.items():
        real = os.path.realpath(os.path.join(folder, directory))
        try:
            with os.scandir(real) as listing:
                listed = {entry.name: entry for entry in listing}
        except OSError:
            listed = {}
        for row, name in rows:
            entry = listed.get(name)
            if entry is not None and entry.is_file(follow_symlinks=False):
                yield row, os.path.join(real, name), entry.inode(), None
                continue
            path = os.path.join(real, name)  # a link, a name in other case, an unlisted directory
            if os.path.isfile(path):
                yield row, os.path.realpath(path), os.stat(path).st_ino, None
            elif entry is not None or os.path.exists(path):
                yield row, None, None, "is not a regular file"


def _number_hard_links(folder, paths, files, inodes, missing):
    """Gives names of one file the number of the first of them, in place."""
    first = {}
    for row, inode in enumerate(inodes.tolist()):
        other = row if row in missing else first.setdefault(inode, row)
        if files[other] != files[row]:  # inodes are unique within a file system only
            if os.path.samefile(*(os.path.join(folder, paths[i]) for i in (other, row))):
                files[row] = files[other]


def missing_files(entries: Entries, found: Files) -> dict[str, str]:
    """{path: sentence} of the files that cannot be opened."""
    paths = {
        os.path.join(entries.folder, entries.paths[i]): why for i, why in found.missing.items()
    }
    return {path: f"image {path} {why}" for path, why in paths.items()}


def conflicts(entries: Entries, found: Files) -> list[str]:
    """Sentences about files with contradicting labels."""
    labels = ["/".join(map(str, entries.labels[i])) for pair in found.conflicts for i in pair]
    paths = [os.path.join(entries.folder, found.paths[row]) for row, _ in found.conflicts]
    pairs = zip(paths, labels[::2], labels[1::2])
    return [f"image {path} has the labels {one} and {other}" for path, one, other in pairs]
