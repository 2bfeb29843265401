"""Checkpoints: tensors and plain Python values in a file that is written whole and read safely.
Copy with: model.py, timm_backbone.py, torch.

    build(architecture)      -> model.UDON, untrained
    save(path, contents)     writes all of a file or nothing, with a digest of its bytes
    load(path, device)       -> (model.UDON in evaluation mode, the contents of the file)
    write_json(path, value)  writes all of a JSON file or nothing

A checkpoint is a dictionary: "version", "model" (state dict), "architecture" (the arguments of
`build`), "preprocessing" ({"mean", "std", "antialias"}), "step", "embedding", "index", "config"
(the options of the run) and "run" (its identity); last.pt also holds the state of the optimizer
and the sampler.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import zipfile
from pathlib import Path

import torch
from torch import nn

from model import UDON, ViT
from timm_backbone import TimmBackbone, TimmError

VERSION = 2
BLOCK = 2**20  # bytes, read at a time
# What a file that no run has written can raise where its contents are used.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint, or not be written: one sentence."""


def build(architecture: dict, backbone: nn.Module | None = None) -> UDON:
    """The untrained model of {"backbone": arguments of ViT, "classes", "student_dim", ...}.

    A backbone of timm is {"timm": name, "image_size": side}; {"module": name, "image_size": side}
    is the one given as `backbone`. Raises CheckpointError for such a description without it.
    """
    arguments = dict(architecture)
    description = arguments.pop("backbone")
    if "module" in description:
        if backbone is None:
            raise CheckpointError(
                f"its backbone is the module {description['module']}, which is not part of this "
                "project: load it in Python with checkpoint.load(path, backbone=module)"
            )
    elif "timm" in description:
        backbone = TimmBackbone(description["timm"], description["image_size"])
    else:
        backbone = ViT(**description)
    return UDON(backbone, arguments.pop("classes"), **arguments)


def save(path: str | os.PathLike, contents: dict) -> None:
    """Writes `contents` and "version" to a file; if the process dies meanwhile, the previous file
    stays. The file is torch's zip archive; its zip comment is the SHA-256 digest of the rest."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            write_archive({"version": VERSION, **contents}, file)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.comment = bytes(64)
        digest = digest_of(partial)
        with open(partial, "r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def write_archive(contents, file):
    """torch.save, which turns an OSError of the file, such as a full disk, into a RuntimeError."""
    failed = []

    class File:
        def write(self, data):
            try:
                return file.write(data)
            except OSError as error:
                failed.append(error)
                raise

        def flush(self):
            file.flush()

    try:
        torch.save(contents, File())
    except RuntimeError:
        if failed:
            raise failed[0] from None
        raise


def digest_of(path) -> bytes:
    """64 hexadecimal digits: SHA-256 of all bytes of a file but the last 64."""
    digest = hashlib.sha256()
    left = os.path.getsize(path) - 64
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest().encode()


def load(
    path: str | os.PathLike, device: str = "cpu", backbone: nn.Module | None = None
) -> tuple[UDON, dict]:
    """The model of a checkpoint, in evaluation mode on `device`, and the contents of the file.

    backbone  the module, filled in place, of a run that was trained with one of its own
    Raises CheckpointError for a file that is missing, damaged, of an older version or no
    checkpoint. Nothing is built before the file's description has been compared with its tensors.
    """
    contents = read(path)
    try:
        check_description(contents)
        check_depth(contents["architecture"], contents["model"])
        with torch.device("meta"):
            described = build(contents["architecture"], backbone)
        if properties(contents["model"]) != properties(described.state_dict()):
            raise ValueError("the description does not fit the tensors")
        model = build(contents["architecture"], backbone)
        model.load_state_dict(contents["model"])
    except (TimmError, CheckpointError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be built: {error}") from None
    except MALFORMED as error:
        raise CheckpointError(
            f"checkpoint {path} is incomplete ({summary(error)}): give a best.pt or last.pt as a "
            "run wrote it"
        ) from None
    return model.to(device).eval(), contents


def properties(weights):
    return {name: (x.shape, x.dtype, x.layout) for name, x in weights.items()}


KINDS = {"architecture": dict, "preprocessing": dict, "model": dict, "config": dict}
KINDS |= {"step": int, "embedding": str, "index": str, "run": str}


def check_description(contents):
    """Raises KeyError, TypeError or ValueError unless the plain values can be those of a run."""
    for name, kind in KINDS.items():
        if not isinstance(contents[name], kind):
            raise TypeError(f"{name} is of type {type(contents[name]).__name__}")
    check_backbone(contents["architecture"]["backbone"])
    mean, std, antialias = (contents["preprocessing"][x] for x in ("mean", "std", "antialias"))
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
        raise ValueError("mean and std of the images are not three finite numbers each")
    choices = {"embedding": ("student", "teacher", "backbone"), "index": ("merged", "separate")}
    for name, values in choices.items():
        if contents[name] not in values:
            raise ValueError(f"the {name} is none of {', '.join(values)}")
    if contents["step"] < 0 or not isinstance(antialias, bool):
        raise ValueError("step or antialias is of another kind")
    if not isinstance(contents["config"]["data"], (str, type(None))):
        raise TypeError("the data directory is no text")
    if not all(isinstance(domain, str) for domain in contents["config"]["domains"] or ()):
        raise TypeError("a domain's name is no text")


def check_backbone(backbone):
    """Raises KeyError, TypeError or ValueError unless this can be the description of a backbone."""
    is_other = isinstance(backbone.get("timm", backbone.get("module")), str)
    sizes = () if is_other else ("patch_size", "width", "depth", "heads")
    for name in ("image_size", *sizes):
        if type(backbone[name]) is not int or backbone[name] < 1:
            raise ValueError(f"{name} of the backbone is no positive number")
    if not is_other and not 0 < backbone["norm_eps"] < 1:
        raise ValueError("norm_eps of the backbone is not between 0 and 1")


def check_depth(architecture, weights):
    """Raises ValueError unless the number of layers described is that of the tensors: even empty
    layers take time and memory."""
    blocks = {name.split(".")[2] for name in weights if name.startswith("backbone.blocks.")}
    layers = [name for name in weights if name.startswith("student_head.")]
    depth = architecture["backbone"].get("depth", len(blocks))  # a name fixes that of timm's models
    head_layers = architecture["head_layers"]
    if depth != len(blocks) or head_layers > len(layers):
        raise ValueError(f"{depth} blocks and {head_layers} head layers do not fit the tensors")


def read(path) -> dict:
    """The contents of a checkpoint file. Raises CheckpointError."""
    if not os.path.isfile(path):  # opening a pipe would block
        raise CheckpointError(
            f"checkpoint {path} does not exist or is no file: give a best.pt or last.pt"
        )
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 64))
            recorded = file.read()
        whole = recorded == digest_of(path)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be opened ({error.strerror}): give a best.pt or last.pt"
        ) from None
    contents = None
    if whole or not re.fullmatch(b"[0-9a-f]{64}", recorded):  # without a digest: an older version
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception:  # zip, pickle and torch share no class of errors
            whole = False
    if isinstance(contents, dict) and "config" in contents and "version" not in contents:
        raise CheckpointError(
            f"checkpoint {path} was written by an older version of this project: train again, or "
            "evaluate it with that version"
        )
    version = contents.get("version") if isinstance(contents, dict) else None
    if not whole or not isinstance(version, int) or version != VERSION:
        raise CheckpointError(
            f"file {path} is not a checkpoint of this version, or it is damaged: give a best.pt or "
            "last.pt as a run wrote it"
        )
    return contents


def summary(error: BaseException) -> str:
    """The first line of an error's message, or the error's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes all of a JSON file or nothing. Raises CheckpointError where it cannot be written."""
    text, partial = json.dumps(value, indent=1) + "\n", Path(f"{path}.partial")
    try:
        is_device = os.path.exists(path) and not os.path.isfile(path)
        if is_device or os.path.islink(path):  # /dev/stdout must not be replaced
            Path(path).write_text(text, encoding="utf-8")
            return
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"file {path} cannot be written ({error.strerror}): give another, or make room"
        ) from None
