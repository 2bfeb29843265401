"""Checkpoints: tensors and plain Python values in a file that is written whole and read safely.
Copy with: export.py, model.py, timm_backbone.py, torch.

    build(architecture)      -> model.UDON, untrained
    save(path, contents)     writes all of a file or nothing, with a digest of its bytes
    load(path, device)       -> (model.UDON in evaluation mode, the contents of the file)
    export(source, target)   writes the student alone, as .pt or .onnx, and a model card
    write_json(path, value)  writes all of a JSON file or nothing

    python checkpoint.py export RUN student.pt     or student.onnx, or RUN/last.pt ...

A checkpoint is a dictionary: "version", "model" (state dict), "architecture" (the arguments of
`build`), "preprocessing" ({"mean", "std", "interpolation", "antialias"}; an older one without
"interpolation" is bilinear), "step", "embedding", "index", "config" (the options of the run), "run"
(its identity) and "class_names" ({domain: names of its training classes}, in the order of the
classifiers); last.pt also holds the state of the optimizer and the sampler. An exported
student has neither teachers nor classifiers; "card" is its model card.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from export import TITLE, ExportError, card, onnx_network, plain
from model import UDON, ViT
from timm_backbone import INTERPOLATIONS, TimmBackbone, TimmError

VERSION = 2
BEST = "best.pt"  # of the directory of a run
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
    with replacing(path) as partial:
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


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the name of a file to write, which replaces `path` at the end of the context. After an
    error, nothing is left of it."""
    partial = Path(f"{path}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
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

    path      a file, or the directory of a run, of which best.pt is loaded
    backbone  the module, filled in place, of a run that was trained with one of its own
    Raises CheckpointError for a file that is missing, damaged, of an older version or no
    checkpoint. Nothing is built before the file's description has been compared with its tensors.
    """
    path = located(path)
    contents = read(path)
    try:
        check_description(contents)
        check_depth(contents["architecture"], contents["model"])
        with torch.device("meta"):
            described = build(contents["architecture"], backbone)
        if is_half(contents["model"]):
            described.half()
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


def located(path: str | os.PathLike) -> Path:
    """The checkpoint that a path names: of the directory of a run, its best.pt."""
    return Path(path, BEST) if os.path.isdir(path) else Path(path)


def is_half(weights):
    """Whether these were exported in half precision; a model computes in single precision."""
    return {x.dtype for x in weights.values() if x.is_floating_point()} == {torch.float16}


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
    allowed = INTERPOLATIONS if antialias else ("bilinear",)
    if contents["preprocessing"].get("interpolation", "bilinear") not in allowed:
        raise ValueError(f"the interpolation of the images is none of {', '.join(allowed)}")
    choices = {"embedding": ("student", "teacher", "backbone"), "index": ("merged", "separate")}
    for name, values in choices.items():
        if contents[name] not in values:
            raise ValueError(f"the {name} is none of {', '.join(values)}")
    if contents["step"] < 0 or not isinstance(antialias, bool):
        raise ValueError("step or antialias is of another kind")
    if not isinstance(contents["config"]["data"], (str, type(None))):
        raise TypeError("the data directory is no text")
    names = contents.get("class_names", {})  # absent from older files
    texts = [*(contents["config"]["domains"] or ()), *names, *itertools.chain(*names.values())]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a domain's or a class's name is no text")


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


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a file ends with a digest, as `save` writes it; `read` finds out if it is damaged."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 64))
        return re.fullmatch(b"[0-9a-f]{64}", file.read()) is not None


def summary(error: BaseException) -> str:
    """The first line of an error's message, or the error's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes all of a JSON file or nothing. Raises CheckpointError where it cannot be written."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes all of a UTF-8 file or nothing; undecodable bytes of file names, as of os.fsdecode,
    are written as they are. Raises CheckpointError where it cannot be written."""
    is_device = os.path.exists(path) and not os.path.isfile(path)
    form = {"encoding": "utf-8", "errors": "surrogateescape"}
    try:
        if is_device or os.path.islink(path):  # /dev/stdout must not be replaced
            Path(path).write_text(text, **form)
            return
        with replacing(path) as partial:
            partial.write_text(text, **form)
    except OSError as error:
        raise CheckpointError(
            f"file {path} cannot be written ({error.strerror}): give another, or make room"
        ) from None


# The student alone --------------------------------------------------------------------------------

STUDENT = ("backbone.", "student_head.")  # prefixes of its parameters
PATHS = ("data", "out", "init", "teachers")  # options that may name places on this machine


def export(source: str | os.PathLike, target: str | os.PathLike, half: bool = False) -> Path:
    """Writes the student of a checkpoint, without teachers and classifiers, and beside it a model
    card -> the file of the card.

    source  a checkpoint, or the directory of a run
    target  .pt: a checkpoint, for `load`; .onnx: a network, as of export.onnx_network
    half    store the weights in half precision; the arithmetic stays float32
    Raises CheckpointError for a checkpoint that cannot be used, a target that cannot be written,
    and missing packages.
    """
    source, target = located(source), Path(target)
    if target.suffix not in (".pt", ".onnx") or target.is_dir() or not target.parent.is_dir():
        raise CheckpointError(
            f"file {target} cannot be exported to: give a file that ends in .pt or .onnx, in a "
            "directory that exists"
        )
    card_file = target.with_suffix(".md")
    if card_file.exists() and not card_file.read_bytes().startswith(TITLE.encode()):
        raise CheckpointError(
            f"file {card_file} would be replaced by the model card of {target}: give another name"
        )
    model, contents = load(source)
    check_student(source, contents)
    exported = student(model, contents, half)
    exported["card"] = contents.get("card") or described(contents | exported, contents, source)
    if target.suffix == ".pt":
        save(target, exported)
    else:
        with replacing(target) as partial:
            partial.write_bytes(as_onnx(source, exported))
    write_text(card_file, exported["card"].replace("{name}", plain(target.stem)))
    return card_file


def check_student(path: str | os.PathLike, contents: dict) -> None:
    """Raises CheckpointError for a checkpoint of a run that trained no student."""
    config = contents["config"]
    if not any(config.get("weights", (1, 1))[1:]):
        raise CheckpointError(
            f"checkpoint {path} has no trained student, since its method is "
            f"{config.get('method')}: give one of udon or udon-joint"
        )


def student(model: UDON, contents: dict, half: bool) -> dict:
    """The contents of a checkpoint of the student alone, with paths reduced to their last part."""
    weights = {name: x for name, x in model.state_dict().items() if name.startswith(STUDENT)}
    if half:
        weights = {name: x.half() if x.is_floating_point() else x for name, x in weights.items()}
    config = dict(contents["config"])
    for name in PATHS:
        if config.get(name):
            config[name] = os.path.basename(os.path.abspath(config[name]))
    kept = ("preprocessing", "step", "index", "run", "class_names")
    return {
        "model": weights,
        "architecture": contents["architecture"] | {"classes": {}, "teacher_dim": 0},
        "embedding": "student",
        "config": config,
        **{name: contents[name] for name in kept if name in contents},
    }


def as_onnx(source, exported) -> bytes:
    model = build(exported["architecture"])
    model.load_state_dict(exported["model"])
    about = ("architecture", "preprocessing", "class_names", "run", "step", "card")
    texts = {name: json.dumps(exported[name]) for name in about if name in exported}
    size = exported["architecture"]["backbone"]["image_size"]
    try:
        return onnx_network(model, size, exported["preprocessing"], texts)
    except ExportError as error:
        raise CheckpointError(f"checkpoint {source} cannot be exported: {error}") from None


def described(exported, contents, source) -> str:
    """The model card, with the test results beside the checkpoint if they are its own."""
    about = exported | {"architecture": contents["architecture"]}
    try:
        results = json.loads(source.with_name("test.json").read_text(encoding="utf-8"))
        if (results["step"], results["embedding"]) == (contents["step"], "student"):
            return card(about, results)
    except (OSError, *MALFORMED):
        pass
    return card(about, None)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {plain(message)}; --help lists the options\n")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="checkpoint.py", description="Takes a trained student away.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = (
        "Writes the student alone, the backbone and its head, with its preprocessing, as a "
        "checkpoint (.pt) or a network for ONNX (.onnx), and beside it a model card (.md)."
    )
    command = commands.add_parser("export", help=text, description=text)
    command.add_argument("checkpoint", help="best.pt or last.pt, or the directory of a run")
    command.add_argument("target", metavar="FILE", help="student.pt or student.onnx, to write")
    command.add_argument("--half", action="store_true", help="store weights in half precision")
    options = parser.parse_args(arguments)
    try:
        file = export(options.checkpoint, options.target, options.half)
    except (CheckpointError, OSError) as error:
        parser.exit(2, f"checkpoint.py: {plain(str(error))}\n")
    size = os.path.getsize(options.target) / 1e6
    print(plain(f"{options.target}: {size:.1f} MB; {file}: its model card"))


if __name__ == "__main__":
    main()
