"""Official checkpoints of UDON and UnED (JAX, Scenic) as model.UDON, with all their heads.

    load(path, domains=None) -> (model.UDON in evaluation mode, contents as of checkpoint.load)

    python flax_weights.py CHECKPOINT FILE.pt [DOMAIN ...]

writes a file that `python evaluate.py FILE.pt` evaluates and `--init FILE.pt` starts from.

The files are Flax's msgpack, `checkpoint_<step>`, of a training state whose `params` are read:

    UDON   universal_student_projection_domain_0/Dense_0, universal_student_output_projection_<d>,
           teacher_projection_domain_<d>/Dense_0, teacher_output_projection_<d>
    UnED   projection, output_projection_<d>, of which a joint classifier has one, 0
    both   the backbone beside them: a ViT in AugReg's layout, or OpenAI's CLIP in Scenic's

Source of the names: github.com/nikosips/UDON (2024-11-18) and /Universal-Image-Embeddings. All
outputs equal those of that code on files that it wrote with random weights; no published file was
available. <d> is the position of a domain in `dataset_name` of the training configuration. Heads of
several layers are refused, because their GELU and LayerNorm differ from those of model.MlpHead, and
so are directories that Orbax wrote.
Copy with: model, pretrained, checkpoint, export, timm_backbone, torch, numpy, msgpack.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
import pretrained
from checkpoint import MALFORMED
from model import UDON, ViT
from pretrained import WeightsError

UNED = {  # number of training classes: domain
    **{78: "cars", 900: "food2k", 1_074: "rp2k", 3_198: "inshop"},
    **{4_552: "inat", 9_054: "sop", 73_182: "gldv2", 224_408: "met"},
}
JOINT = "joint"  # the only domain of a model with one classifier for the classes of all
BACKBONE = (  # first parts of the keys of a ViT and of a CLIP
    *("embedding", "cls", "Transformer"),
    *("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post"),
)
HEADS = {  # part of model.UDON: pattern of its keys
    "student_head": r"(universal_student_projection_domain_0/Dense_0|projection)/(kernel|bias)",
    "student_classifiers": r"(universal_student_)?output_projection_(?P<domain>\d+)/(kernel)",
    "teacher_heads": r"teacher_projection_domain_(?P<domain>\d+)/Dense_0/(kernel|bias)",
    "teacher_classifiers": r"teacher_output_projection_(?P<domain>\d+)/(kernel)",
}
Heads = dict[tuple[str, int | None], dict[str, Tensor]]  # {(part, position of the domain): tensors}


def load(path: str | Path, domains: Sequence[str] | None = None) -> tuple[UDON, dict]:
    """The model of an official checkpoint in evaluation mode, and its description.

    domains  names in the order of the training configuration. Without them, those in config.json
             beside the file, or those of UnED with as many classes. A single classifier is that of
             the domain "joint".
    The contents are those of checkpoint.load; "config" holds no more than evaluate.py needs. Images
    are resized without antialiasing, as in the official code.
    Raises WeightsError for files of another kind, unknown and missing keys, and other shapes.
    """
    path = Path(path)
    try:
        state = read(path)
        backbone, heads = divide(flat(parameters(state)))
        vit, preprocessing = build_vit(backbone)
        counts = class_counts(heads)
        names = domain_names(path, counts, domains)
        model, architecture = build_model(vit, heads, dict(zip(names, counts)))
        step = number(state.get("global_step", 0))
    except ValueError as error:  # WeightsError, or the ViT's own
        raise WeightsError(pretrained.message(path, error)) from None
    contents = {
        "model": model.state_dict(),
        "architecture": architecture,
        "preprocessing": {**preprocessing._asdict(), "antialias": False},
        "step": step,
        "embedding": "student",
        "index": "merged",
        "config": {"data": None, "domains": None},
        "run": path.name,
    }
    return model.eval(), contents


# ---- reading Flax's msgpack ----------------------------------------------------------------------


def read(path: Path) -> dict:
    """The tree of a file; its arrays are not decoded yet."""
    try:
        import msgpack
    except ImportError:
        raise WeightsError("the package msgpack is missing: pip install -e '.[interop]'") from None
    try:
        tree = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
    except OSError as error:  # a directory, too
        raise WeightsError(
            f"cannot be read ({error.strerror}): give the file checkpoint_<step> of a run"
        ) from None
    except Exception as error:  # msgpack's share no class
        reason = str(error) or type(error).__name__
        raise WeightsError(
            f"not Flax's msgpack, or damaged ({reason}): give the file checkpoint_<step> of a run"
        ) from None
    if not isinstance(tree, dict):
        raise WeightsError("it holds no training state: give the file checkpoint_<step> of a run")
    return tree


def parameters(tree: dict) -> dict:
    """The parameters within a training state; older states keep them in optimizer.target."""
    for name in ("params", "optimizer", "target"):
        if isinstance(tree.get(name), dict):
            return parameters(tree[name])
    return tree


def decoded(value: Any) -> Any:
    """An array or number of numpy as a tensor, whole if it was stored in chunks. Others as is.

    Flax stores an array as extension 1, a number as 3: the msgpack of (shape, dtype, bytes).
    """
    if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
        chunks = [decoded(value["chunks"][str(i)]) for i in range(len(value["chunks"]))]
        return torch.cat(chunks).reshape([*value["shape"].values()])
    if getattr(value, "code", None) not in (1, 3):
        return value
    import msgpack

    shape, dtype, content = msgpack.unpackb(value.data, raw=True)
    dtype = getattr(torch, dtype.decode())
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


def number(value: Any) -> int:
    try:
        return max(int(decoded(value)), 0)
    except MALFORMED as error:
        raise WeightsError(f"global_step is no number ({error}): give the original file") from None


def flat(tree: dict, prefix: str = "") -> dict[str, Tensor]:
    """{"a/b/c": tensor} of a tree of arrays."""
    tensors = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "__msgpack_chunked_array__" not in value:
            tensors |= flat(value, f"{name}/")
            continue
        try:
            tensors[name] = decoded(value)
        except MALFORMED as error:
            raise WeightsError(f"{name} cannot be decoded ({error}): download it again") from None
        if not isinstance(tensors[name], Tensor):
            raise WeightsError(f"{name} is no array: give the file checkpoint_<step> of a run")
    return tensors


# ---- from the names of the official code to model.UDON -------------------------------------------


def divide(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Heads]:
    """The tensors of the backbone, and those of the heads under the names of model.UDON's."""
    pretrained.check_tensors(tensors)
    backbone, heads = {}, {}
    for key, value in tensors.items():
        if key.split("/")[0] in BACKBONE:
            backbone[key] = value
            continue
        found = {part: re.fullmatch(pattern, key) for part, pattern in HEADS.items()}
        part = next((part for part, match in found.items() if match), None)
        if part is None:
            raise WeightsError(
                f"key {key} is unknown: the backbone and heads of one layer of UDON and UnED can "
                "be read"
            )
        domain = found[part].groupdict().get("domain")
        tensors_of_part = heads.setdefault((part, None if domain is None else int(domain)), {})
        if key.endswith("kernel") and value.ndim != 2:
            raise WeightsError(f"{key} has {value.ndim} dimensions, not 2")
        # kernels are (in, out) in Flax
        name, value = ("weight", value.T) if key.endswith("kernel") else ("bias", value)
        if name in tensors_of_part:
            raise WeightsError(f"{key} is there under two names: give the original file")
        tensors_of_part[name] = value
    return backbone, heads


def build_vit(arrays: dict[str, Tensor]) -> tuple[ViT, pretrained.Preprocessing]:
    """The backbone, of the size of its arrays."""
    if not any(key.startswith(("Transformer/", "transformer/")) for key in arrays):
        raise WeightsError("there is no backbone: give the file checkpoint_<step> of a run")
    family, weights = pretrained.recognise(pretrained.Checkpoint({}, arrays))
    if family.heads is None:
        raise WeightsError("the backbone has no attention: give the whole file")
    try:
        width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        rows = weights["pos_embed"].shape[1]
    except (KeyError, ValueError) as error:
        raise WeightsError(f"the backbone is incomplete ({error}): give the whole file") from None
    vit = ViT(
        math.isqrt(rows - 1) * patch_size,
        patch_size,
        width,
        len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
        family.heads,
        hidden / width,
        activation=family.activation,
        norm_eps=family.norm_eps,
        pre_norm=family.pre_norm,
    )
    pretrained.fit(vit, weights, family)
    vit.load_state_dict(weights)
    return vit, family.preprocessing


def class_counts(heads: Heads) -> list[int]:
    """The number of classes of each domain."""
    classifiers = {place: parts for (name, place), parts in heads.items() if "student_c" in name}
    if sorted(classifiers) != [*range(len(classifiers))] or not classifiers:
        raise WeightsError(
            f"there are student classifiers of the domains {sorted(classifiers)}: 0, 1, 2 and so "
            "on are needed, give the whole file"
        )
    return [len(classifiers[place]["weight"]) for place in range(len(classifiers))]


def domain_names(path: Path, counts: list[int], domains: Sequence[str] | None) -> list[str]:
    """The names of the domains, in the order of their classifiers."""
    if domains is None:
        domains = configured_domains(path) or [UNED.get(count) for count in counts]
        if len(counts) == 1 and (len(domains) > 1 or None in domains):
            return [JOINT]
    if None in domains:
        count = counts[domains.index(None)]
        raise WeightsError(
            f"a domain of {count} classes is none of UnED's: name all domains, in the order of "
            "dataset_name in the training configuration"
        )
    if len(domains) != len(counts) or len({*domains}) < len(domains):
        raise WeightsError(
            f"the domains are {', '.join(domains)}, but the file has {len(counts)} classifiers: "
            "give as many different names"
        )
    return [*domains]


def configured_domains(path: Path) -> list[str]:
    """Those of the training configuration beside the file; none if there is no such file."""
    try:
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        return config["dataset_name"].split(",")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


def build_model(vit: ViT, heads: Heads, classes: dict[str, int]) -> tuple[UDON, dict]:
    """The filled model, and its architecture for checkpoint.build."""
    student, teacher = heads.get(("student_head", None), {}), heads.get(("teacher_heads", 0), {})
    if "weight" not in student:
        raise WeightsError("there is no student head: give a checkpoint of UDON or UnED")
    student_dim, teacher_dim = len(student["weight"]), len(teacher.get("weight", ()))
    model = UDON(vit, classes, student_dim=student_dim, teacher_dim=teacher_dim)
    modules = {("student_head", None): model.student_head}
    for place, domain in enumerate(classes):
        modules["student_classifiers", place] = model.student_classifiers[domain]
        if teacher_dim:
            modules["teacher_heads", place] = model.teacher_heads[domain]
            modules["teacher_classifiers", place] = model.teacher_classifiers[domain]
    for key in modules.keys() | heads.keys():
        expected = shapes(modules[key].state_dict()) if key in modules else {}
        actual = shapes(heads.get(key, {}))
        if actual != expected:
            part, place = key
            domain = "" if place is None else f" of domain {place}"
            raise WeightsError(
                f"{part}{domain}: the file has {actual or 'nothing'}, the other heads need "
                f"{expected or 'nothing'}; give the original file"
            )
        modules[key].load_state_dict(heads[key])
    architecture = {
        "backbone": vit.architecture,
        "classes": classes,
        "student_dim": student_dim,
        "teacher_dim": teacher_dim,
        "head_layers": 1,
    }
    return model, architecture


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}


# ---- python flax_weights.py CHECKPOINT FILE.pt ---------------------------------------------------


def main(arguments: list[str]) -> None:
    """Converts a checkpoint; exits with status 2 on an error."""
    try:
        if len(arguments) < 2:
            raise WeightsError(f"give the checkpoint and the file to write, not {arguments}")
        source, target, *domains = arguments
        contents = load(source, domains or None)[1]
        checkpoint.save(target, contents)
    except (WeightsError, OSError) as error:
        print(f"flax_weights.py: {error}", file=sys.stderr)
        sys.exit(2)
    classes = contents["architecture"]["classes"].items()
    counts = ", ".join(f"{domain} {count:,}" for domain, count in classes)
    print(f"{target}: step {contents['step']:,}; classes: {counts}")


if __name__ == "__main__":
    main(sys.argv[1:])
