"""The student for torch.hub.

    model, preprocess = torch.hub.load(DIR, "udon", source="local", checkpoint="best.pt")
    vectors = model.embed(preprocess(PIL.Image.open("photo.jpg")))  # (1, S) float32, unit rows

Copy with: search, checkpoint, data, distributed, export, folders, gallery, images, kernels/, model,
procedural, timm_backbone, torch, numpy, pillow.
"""

import contextlib as _contextlib
import sys as _sys
from pathlib import Path as _Path

dependencies = ["torch", "numpy", "PIL"]  # the functions of this file are torch.hub.list()

_HERE = _Path(__file__).resolve().parent


def udon(checkpoint=None, device="auto"):
    """The student of a checkpoint -> model, preprocess.

    checkpoint  a run, a checkpoint or an exported student; without it, weights/student.pt
    device      "auto": a GPU where there is one
    model       model.UDON in evaluation mode; model.embed: (B, 3, size, size) -> (B, S) unit rows
    preprocess  a PIL image, file or (H, W, 3) uint8 array -> (1, 3, size, size) float32
    """
    with _own_modules():
        import search

        embedder = search.Embedder(checkpoint or _HERE / "weights" / "student.pt", device)
    return embedder.model, lambda picture: embedder.images([picture])


@_contextlib.contextmanager
def _own_modules():
    """Imports modules of this project, whose names are common, without a trace: a program may have
    modules of the same names."""
    names = {path.stem for path in _HERE.glob("*.py")} - {"hubconf"} | {"kernels"}

    def loaded():
        return [name for name in _sys.modules if name.split(".")[0] in names]

    theirs = {name: _sys.modules.pop(name) for name in loaded()}
    _sys.path.insert(0, str(_HERE))
    try:
        yield
    finally:
        _sys.path.remove(str(_HERE))
        for name in loaded():
            del _sys.modules[name]
        _sys.modules.update(theirs)
