"""Mutated inputs, handed to the public entry points; faults.py runs them and counts.

    CASES                {kind: (share of all mutations, case)}
    case(work)           prepares one kind in the directory `work` -> attempt
    attempt(rng)         one mutation: returns None if it was accepted and gave what the input says,
                         or a text that says what is wrong; raises what the entry point raises
    prepare(work)        writes the data and the runs that the cases mutate
    Refused              a command line ended with status 2 and this text on stderr

A case never needs more than random.Random, so that each mutation is a function of its number.
"""

import contextlib
import copy
import dataclasses
import io
import json
import posixpath
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

import checkpoint
import config
import data
import evaluate
import pretrained
import udon
from model import ViT

ODD = (
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**63, -(2**63), 10**400),
    *(float("nan"), float("inf"), "", "\0", "\n", "\ud800", "a" * 5000, "nan", "all", "train"),
    *("../../outside", "/etc/passwd", "a/../b", "a\\b", [], {}, [[]], {"a": []}, [1, "a"]),
)
SMALL = ["--preset", "micro", "--batch-size", "4", "--period", "4", "--workers", "0"]
SMALL += ["--device", "cpu", "--val-every", "4", "--save-every", "2"]


class Refused(Exception):
    """A command line ended with status 2; the argument is what it wrote to stderr."""


class Started(Exception):
    """The first training step has been done."""


# What is mutated ----------------------------------------------------------------------------------


def write_data(root: Path) -> None:
    """Two domains in the UnED layout, 5 classes of 2 images per split; a class is a colour."""
    rng = np.random.default_rng(0)
    for domain in ("d0", "d1"):
        first = 0
        for split in ("train", "val", "test"):
            entries = []
            for label in range(first, first + 5):
                colour = rng.integers(40, 216, 3)
                for number in range(2):
                    path = f"{domain}/{split}/{label}_{number}.png"
                    pixels = (colour + rng.integers(-30, 31, (48, 48, 3))).astype(np.uint8)
                    (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(root / "images" / path)
                    entries.append({"path": path, "class_id": label})
            first += 5
            manifest = root / "info_files" / domain / f"{split}.json"
            manifest.parent.mkdir(parents=True, exist_ok=True)
            manifest.write_text(json.dumps(entries))


def prepare(work: Path) -> None:
    """Writes work/data and work/half, a run of 6 steps which may be resumed to more."""
    write_data(work / "data")
    options = [*SMALL, "--data", str(work / "data"), "--steps", "6"]
    command(udon.main, ["train", *options, "--out", str(work / "half")])


def command(main: Callable, arguments: list[str]) -> None:
    """Calls a command line in this process. Raises Refused if it ends with status 2."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            main(arguments)
    except SystemExit as end:
        if end.code == 2:
            raise Refused(stderr.getvalue().removesuffix("\n")) from None
        if end.code:
            raise RuntimeError(f"status {end.code}") from None


# Mutations ----------------------------------------------------------------------------------------


def mutated_bytes(rng: Random, raw: bytes) -> bytes:
    """Flipped bits, or a range that is cut, inserted, deleted, repeated or overwritten."""
    result = bytearray(raw or b"\0")
    start, length = rng.randrange(len(result)), 1 << rng.randrange(12)
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del result[start:]
    elif kind == 2:
        result[start:start] = rng.randbytes(length)
    elif kind == 3:
        del result[start : start + length]
    elif kind == 4:
        result[start:start] = result[start : start + length]
    else:  # zeros, or integers as large as they can be
        value = b"\0" * min(length, 64) if kind == 5 else rng.choice((b"\xff", b"\x7f\xff")) * 4
        result[start : start + len(value)] = value
    return bytes(result)


def slots(tree: object) -> list[tuple]:
    """(container, key) of every value inside nested dictionaries and lists."""
    found = []
    if isinstance(tree, (dict, list)):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            found += [(tree, key), *slots(tree[key])]
    return found


def mutated_tree(rng: Random, tree: object, odd: tuple = ODD) -> object:
    """A copy of nested dictionaries and lists with one value replaced, removed or moved."""
    root = [copy.deepcopy(tree)]
    container, key = rng.choice(slots(root))
    kind = rng.randrange(8)
    if kind == 0 and container is not root:
        del container[key]
    elif kind == 1:
        container[key] = [container[key]]
    elif kind == 2 and isinstance(container, dict):
        container[rng.choice(("", "a" * 300, "\0", f"{key} ", "path"))] = container.pop(key)
    elif kind == 3:
        other, place = rng.choice(slots(root))
        container[key] = copy.deepcopy(other[place])
    else:
        container[key] = copy.deepcopy(rng.choice(odd))
    return root[0]


def mutated_json(rng: Random, tree: object) -> bytes:
    """JSON text whose structure, or whose bytes, have been mutated."""
    if rng.random() < 0.6:
        tree = mutated_tree(rng, tree)
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    raw = text.encode("utf-8", "surrogatepass")
    kind = rng.randrange(16)
    if kind == 0:
        return b"\xef\xbb\xbf" + raw
    if kind == 1:
        return text.encode("utf-16", "surrogatepass")
    if kind == 2:
        return rng.choice((b"[", b'{"a":', b"[0,")) * rng.choice((50, 2000, 200_000))
    if kind == 3:
        return re.sub(rb"\d+", b"1" * rng.choice((20, 400, 5000)), raw, count=1)
    return mutated_bytes(rng, raw) if kind < 10 else raw


# Cases --------------------------------------------------------------------------------------------


def manifests(work):
    root = work / "manifests"
    shutil.copytree(work / "data", root, dirs_exist_ok=True)

    def attempt(rng):
        name = rng.choice(("train", "val", "test"))
        source = work / "data" / "info_files" / "d0" / f"{name}.json"
        raw = mutated_json(rng, json.loads(source.read_text()))
        file = root / "info_files" / "d0" / f"{name}.json"
        file.write_bytes(raw)
        try:
            split = data.Benchmark(root).split("d0", name)
        finally:
            shutil.copyfile(source, file)
        entries = {}
        for entry in json.loads(raw.decode("utf-8-sig")):
            path = posixpath.normpath(entry["path"].replace("\\", "/"))
            entries[path] = sorted(set(np.atleast_1d(entry["class_id"]).tolist()))
        labels = sorted(sorted(set(np.atleast_1d(label).tolist())) for label in split.labels)
        return None if labels == sorted(entries.values()) else "other labels than the manifest's"

    return attempt


def images(work):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 24, 4), dtype=np.uint8)
    grey = Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + 7)
    exif = Image.Exif()
    exif[0x112] = 6
    colour, alpha = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    files = [(colour, suffix, {}) for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif", "ppm")]
    files += [(alpha, "png", {}), (grey, "png", {}), (grey, "tif", {}), (alpha, "webp", {})]
    files += [(colour, "jpg", {"exif": exif}), (colour, "jpg", {"progressive": True})]
    files += [(colour.convert("P"), "png", {}), (colour.convert("CMYK"), "jpg", {})]
    files += [(colour, "tif", {"compression": "tiff_lzw"})]
    sources = []
    for number, (image, suffix, options) in enumerate(files):
        path = work / f"image{number}.{suffix}"
        image.save(path, **options)
        sources.append((path.suffix, path.read_bytes(), np.asarray(data.open_image(path))))

    def attempt(rng):
        suffix, raw, before = rng.choice(sources)
        raw = mutated_bytes(rng, raw)
        path = work / f"image{suffix}"
        path.write_bytes(raw)
        image = data.open_image(path)
        if image.mode != "RGB" or not min(image.size):
            return f"an image of mode {image.mode} and size {image.size}"
        same = before.shape == (*image.size[::-1], 3) and (before == np.asarray(image)).all()
        return "a PNG with a wrong checksum" if not same and has_wrong_crc(raw) else None

    return attempt


def has_wrong_crc(raw):
    """Whether the bytes begin as a PNG, and a chunk's checksum is wrong."""
    place = 8
    while raw.startswith(b"\x89PNG\r\n\x1a\n") and place + 12 <= len(raw):
        end = place + 8 + int.from_bytes(raw[place : place + 4])
        if zlib.crc32(raw[place + 4 : end]) != int.from_bytes(raw[end : end + 4]):
            return True
        if raw[place + 4 : place + 8] == b"IEND":
            return False
        place = end + 4
    return False


def checkpoints(work):
    """Bytes: every change must be found."""
    sources = [small_checkpoint(work), (work / "half" / "best.pt").read_bytes()]

    def attempt(rng):
        raw = sources[rng.random() < 0.2]
        path, changed = work / "checkpoint.pt", mutated_bytes(rng, raw)
        path.write_bytes(changed)
        checkpoint.load(path)
        return None if changed == raw else "a damaged checkpoint was loaded"

    return attempt


def small_checkpoint(work) -> bytes:
    _, contents = checkpoint.load(work / "half" / "best.pt")
    backbone = contents["architecture"]["backbone"]
    backbone = {**backbone, "image_size": 32, "width": 24, "depth": 1, "stem": "patch"}
    classes = {"d0": 5, "d1": 5}
    contents["architecture"] = dict(backbone=backbone, classes=classes)
    contents["architecture"] |= {"student_dim": 8, "teacher_dim": 8, "head_layers": 1}
    contents["model"] = checkpoint.build(contents["architecture"]).state_dict()
    checkpoint.save(work / "small.pt", contents)
    return (work / "small.pt").read_bytes()


def rewritten_checkpoints(work):
    """Contents: what is loaded must be usable."""
    small_checkpoint(work)
    _, contents = checkpoint.load(work / "small.pt")
    contents, odd = plain(contents), ODD + odd_tensors()
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def attempt(rng):
        path, name = work / "rewritten.pt", rng.choice(list(contents))
        checkpoint.save(path, {**contents, name: mutated_tree(rng, contents[name], odd)})
        model, loaded = checkpoint.load(path)
        statistics = loaded["preprocessing"]
        model.embed(data.normalise(pixels, statistics["mean"], statistics["std"]))

    return attempt


def plain(tree):
    """A copy with plain dictionaries."""
    return {key: plain(x) for key, x in tree.items()} if isinstance(tree, dict) else tree


def odd_tensors():
    return (
        *(torch.tensor(float("nan")), torch.zeros(0), torch.zeros(3, 1).expand(3, 10**12)),
        *(torch.ones(8, dtype=torch.int64), torch.eye(8).to_sparse(), torch.eye(24)),
        *(torch.full((8, 24), float("nan")), torch.zeros(8, 24, dtype=torch.float64)),
    )


def weight_files(work):
    vit = ViT(image_size=32, width=24, depth=1, heads=3)
    weights = {key: value.clone() for key, value in vit.state_dict().items()}
    sources = weight_sources(work, weights)
    intact = {}
    for file in sources:
        copied = copy.deepcopy(vit)
        intact[file] = quiet_load(copied, file), copied.state_dict()

    def attempt(rng):
        file = rng.choice(sources)
        path, rewrite = work / f"weights{file.suffix}", rng.random() < 0.3
        if rewrite:
            path = work / "weights.pth"
            tree = {"model": weights} if rng.random() < 0.5 else weights
            torch.save(mutated_tree(rng, tree, ODD + odd_tensors()), path)
        else:
            path.write_bytes(mutated_bytes(rng, file.read_bytes()))
        network = copy.deepcopy(vit)
        try:
            preprocessing = quiet_load(network, path)
        except pretrained.WeightsError:
            if equal(network.state_dict(), vit.state_dict()):
                raise
            return "the network was changed before the file was refused"
        if not all(value.isfinite().all() for value in network.state_dict().values()):
            return "weights that are not finite"
        has_checksums = not rewrite and file.suffix != ".safetensors"
        same = equal(network.state_dict(), intact[file][1]) and preprocessing == intact[file][0]
        return "damaged weights were loaded" if has_checksums and not same else None

    return attempt


def weight_sources(work, weights):
    files = [work / f"intact.{suffix}" for suffix in ("pth", "npz", "safetensors", "pt")]
    torch.save(weights, files[0])
    np.savez(files[1], **augreg_arrays(weights))
    torch.save({"state_dict": {f"module.{key}": x.half() for key, x in weights.items()}}, files[3])
    try:
        from safetensors.torch import save_file
    except ImportError:
        return [files[0], files[1], files[3]]
    save_file(weights, files[2])
    return files


def augreg_arrays(weights) -> dict[str, np.ndarray]:
    """The arrays of an AugReg file for a ViT of one block and 3 heads."""
    block = "Transformer/encoderblock_0/"
    arrays = {
        "cls": weights["cls_token"],
        "embedding/kernel": weights["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
    }
    norms = {"Transformer/encoder_norm": "norm", f"{block}LayerNorm_0": "blocks.0.norm1"}
    norms[f"{block}LayerNorm_2"] = "blocks.0.norm2"
    for name, key in norms.items():
        arrays |= {
            f"{name}/scale": weights[f"{key}.weight"],
            f"{name}/bias": weights[f"{key}.bias"],
        }
    for name, key in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        arrays[f"{block}MlpBlock_3/{name}/kernel"] = weights[f"blocks.0.mlp.{key}.weight"].T
        arrays[f"{block}MlpBlock_3/{name}/bias"] = weights[f"blocks.0.mlp.{key}.bias"]
    attention, width = f"{block}MultiHeadDotProductAttention_1/", weights["cls_token"].shape[-1]
    kernels = weights["blocks.0.attn.qkv.weight"].chunk(3)
    biases = weights["blocks.0.attn.qkv.bias"].chunk(3)
    for name, kernel, bias in zip(("query", "key", "value"), kernels, biases):
        arrays[f"{attention}{name}/kernel"] = kernel.T.reshape(width, 3, -1)
        arrays[f"{attention}{name}/bias"] = bias.reshape(3, -1)
    arrays[f"{attention}out/kernel"] = weights["blocks.0.attn.proj.weight"].T.reshape(3, -1, width)
    arrays[f"{attention}out/bias"] = weights["blocks.0.attn.proj.bias"]
    return {name: value.contiguous().numpy() for name, value in arrays.items()}


def quiet_load(vit, path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pretrained.load(vit, path)


def equal(first, second):
    same_names = first.keys() == second.keys()
    return same_names and all(torch.equal(first[name], second[name]) for name in first)


def options(work):
    """Values given to Config."""
    sources = [config.Config()] + [config.Config(preset=name) for name in config.PRESETS]
    sources = [json.loads(json.dumps(dataclasses.asdict(source))) for source in sources]

    def attempt(rng):
        values = rng.choice(sources)
        for _ in range(rng.choice((1, 1, 2))):
            values = mutated_tree(rng, values)
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            values = {"steps": values}
        made = config.Config(**values)
        kept = json.loads(json.dumps(dataclasses.asdict(made), allow_nan=False))
        return None if config.Config(**kept) == made else "another value after JSON"

    return attempt


def command_lines(work):
    """Strings given to `udon.py train`, up to the first step, and to `evaluate.py`."""
    stop_after_a_step()
    names = [*config.DEFAULTS, "resume", "nonsense"]
    texts = ["", "-1", "0", "1", "1e308", "nan", "-inf", "9" * 400, "9" * 18, "1e-320", "x" * 5000]
    texts += ["\n", "\udcff", "-", "--", "d0", "mini", "udon", "all", "cpu", "cuda:9", "1 1 1 1"]
    texts += [str(work / "data"), str(work / "half"), "/dev/null", "0x10", "1_000", "\u0661", "é"]

    def attempt(rng):
        given = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            name, count = rng.choice(names).replace("_", "-"), rng.choice((0, 1, 1, 1, 4))
            given += [f"--{name}", *rng.choices(texts, k=count)]
        if rng.random() < 0.2:
            arguments = [str(work / "half" / "best.pt"), "--data", str(work / "data"), *given]
            return command(evaluate.main, arguments)
        out = work / "runs" / "new"
        arguments = [*SMALL, "--steps", "2", "--data", str(work / "data"), *given]
        try:
            with contextlib.suppress(Started):
                command(udon.main, ["train", *arguments, "--out", str(out)])
        finally:
            shutil.rmtree(work / "runs", ignore_errors=True)

    return attempt


def stop_after_a_step():
    """Lets udon's training loop raise Started after its first step."""
    logged_step = udon.logged_step

    def first_step(*arguments):
        logged_step(*arguments)
        raise Started

    udon.logged_step = first_step


def run_directories(work):
    """Files of a run's directory that is resumed, up to the first step."""
    stop_after_a_step()
    source, out = work / "half", work / "resumed"
    last, odd = plain(torch.load(source / "last.pt", weights_only=True)), ODD + odd_tensors()
    settings = json.loads((source / "config.json").read_text())

    def attempt(rng):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, out)
        kind = rng.choice(("config.json", "metrics.jsonl", "best.pt", "last.pt", "state"))
        file = out / ("last.pt" if kind == "state" else kind)
        before = file.read_bytes()
        if kind == "config.json":
            file.write_bytes(mutated_json(rng, settings))
        elif kind == "state":
            names = ("optimizer", "sampler", "best", "validated", "backbone", "metrics", "step")
            name = rng.choice((*names, "run", "config", "digests"))
            checkpoint.save(file, {**last, name: mutated_tree(rng, last[name], odd)})
        elif kind == "metrics.jsonl" and rng.random() < 0.5:
            file.write_bytes(mutated_lines(rng, before))
        else:
            file.write_bytes(mutated_bytes(rng, before))
        changed = file.read_bytes()
        with contextlib.suppress(Started):
            command(udon.main, ["train", "--resume", "--steps", "8", "--out", str(out)])
        return consequence(kind, before, changed, out, settings)

    return attempt


def mutated_lines(rng, raw):
    """Lines removed, repeated or in another order."""
    lines = raw.splitlines(keepends=True)
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(3)
    if kind == 0:
        del lines[first]
    elif kind == 1:
        lines.insert(second, lines[first])
    else:
        lines[first], lines[second] = lines[second], lines[first]
    return b"".join(lines)


def consequence(kind, before, changed, out, settings):
    """What is wrong with a run that was resumed although a file had been changed, or None."""
    if kind == "config.json":
        kept = json.loads((out / kind).read_text())
        fixed = [name for name in settings if name not in config.MAY_CHANGE]
        same = all(kept[name] == settings[name] for name in fixed)
        return None if same else "other options than those of the run"
    if kind == "metrics.jsonl":
        same = (out / kind).read_bytes().startswith(before)
        return None if same else "other metrics than those of the run"
    if kind == "state" or changed == before:
        return None
    return f"a damaged {kind} was used"


CASES = {
    "manifests": (0.25, manifests),
    "images": (0.25, images),
    "checkpoints": (0.12, checkpoints),
    "checkpoints with other contents": (0.08, rewritten_checkpoints),
    "weight files": (0.12, weight_files),
    "options": (0.12, options),
    "command lines": (0.03, command_lines),
    "run directories": (0.03, run_directories),
}
