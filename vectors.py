"""Files of embeddings: vectors of images that any model computed, found again by the images' paths.

    read(path)                        -> vectors (N, D), paths (N,) of an .npz file
    FileVectors(path, root)           the vectors of an .npz file
    .of(split)                        -> (M, D) float32, those of the images of a data.Split

The file is one of numpy.savez with `vectors` (N, D), floating point, of any norm, and `paths` (N,),
text, absolute or below a root. Copy with: folders, images, torch, numpy, pillow.
"""

import os
import zipfile

import numpy as np
import torch

from folders import Entries, look_up
from images import InputError

REMEDY = "give a file of numpy.savez with vectors (N, D), floating point, and paths (N,), text"
# What numpy raises for a file that is no archive, is damaged, lacks an array or holds objects.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, EOFError, zipfile.BadZipFile)


def read(path: str | os.PathLike) -> tuple[np.ndarray, list[str]]:
    """The arrays of a file. Raises InputError for a file without them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            vectors, paths = file["vectors"], file["paths"]
    except OSError as error:
        raise InputError(f"file {path} cannot be read ({error.strerror}): {REMEDY}") from None
    except MALFORMED:
        raise InputError(f"file {path} does not hold the arrays: {REMEDY}") from None
    if vectors.dtype.kind != "f" or vectors.ndim != 2 or paths.dtype.kind not in "US":
        raise InputError(
            f"file {path} has vectors of shape {vectors.shape}, {vectors.dtype}, and paths of type "
            f"{paths.dtype}: {REMEDY}"
        )
    if paths.shape != vectors.shape[:1] or not vectors.size:
        raise InputError(
            f"file {path} has vectors of shape {vectors.shape} and paths of shape {paths.shape}: "
            f"{REMEDY}"
        )
    return vectors, [os.fsdecode(name) for name in paths.tolist()]


class FileVectors:
    """The vectors of a file, whose paths are absolute or below `root`. Images are told apart by
    their files, not by how paths are spelt. Raises InputError for a file that cannot be used."""

    def __init__(self, path: str | os.PathLike, root: str | os.PathLike):
        self.path, self.root = path, root
        self.vectors, paths = read(path)
        found = look_up(Entries(str(root), paths, [()] * len(paths)))
        repeated = set(range(len(paths))) - set(found.kept) - set(found.missing)
        if repeated:
            raise InputError(
                f"file {path} names {paths[min(repeated)]} twice: give each image one vector"
            )
        kept = np.array(found.kept, dtype=np.int64)
        self.rows = kept[np.argsort(found.files[kept])]
        self.files = found.files[self.rows]  # ascending
        self.used = np.zeros(len(paths), dtype=bool)

    def of(self, split) -> torch.Tensor:
        """The vectors of the images of a data.Split. Raises InputError if the file lacks one."""
        places = np.searchsorted(self.files, split.files)
        lacking = np.append(self.files, 0)[places] != split.files
        if lacking.any():
            raise InputError(
                f"file {self.path} lacks {lacking.sum():,} of the {len(split):,} images of domain "
                f"{split.domain}, split {split.name}, such as {split.path(lacking.argmax())}: give "
                f"a vector for each, with paths that are absolute or below {self.root}"
            )
        rows = self.rows[places]
        self.used[rows] = True
        vectors = torch.from_numpy(self.vectors[rows]).float()
        finite = vectors.isfinite().all(1)
        if not finite.all():
            name = split.path(int(finite.int().argmin()))
            raise InputError(f"file {self.path} has values for {name} that are not finite")
        return vectors
