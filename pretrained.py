"""Reads public ViT weights into model.ViT.    Copy with: torch and numpy (safetensors for .safetensors files).

    load(vit, path) -> Preprocessing(mean, std)    fills the ViT in place, all of it or nothing
    COMPACT                                        {size of model.SIZES: file} of the project's own weights

    python pretrained.py RUN/best.pt FILE.pt       keeps of a checkpoint what `load` needs, in half precision

Four families, told apart by the file's own keys; each fixes the activation, the LayerNorm epsilon, whether there is a norm
before the blocks, and the statistics its images were normalised with. All of that is set here, and none of it by the user,
because getting it wrong is silent.

    AugReg   .npz of the JAX ViT code (arXiv:2106.10270)     gelu_tanh   1e-6   mean and std 0.5
    timm     vit_* state dict                                gelu        1e-6   mean and std 0.5
             vit_*_clip_* (has norm_pre)                     gelu        1e-5   CLIP's
    CLIP     OpenAI / open_clip, keys `visual.*`             quick_gelu  1e-5   CLIP's
    ours     checkpoints of udon.py, keys `backbone.*`       as written in the checkpoint

DeiT, DINO and MAE files have timm's keys too, but were trained on ImageNet's mean and std: not supported, since no key tells.
"""

import os
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

COMPACT = {name: Path(__file__).with_name("weights") / f"{name}.pt" for name in ("micro", "mini")}


class WeightsError(ValueError):
    """The file cannot fill the ViT; the message is one sentence that names the keys or shapes and the remedy."""


class Preprocessing(NamedTuple):
    mean: tuple  # per channel R, G, B, of images in [0, 1]
    std: tuple


HALF = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def load(vit, path, *, activation=None):
    """Fills `vit` (model.ViT) with the weights in `path`; the position table is resized to its grid (a warning says so).

    path        .npz (AugReg), .safetensors (timm), or what torch.load reads with weights_only=True or torch.jit.load (timm
                and CLIP state dicts, bare or under "state_dict" or "model"; OpenAI's own archives). Any float dtype.
    activation  overrides the family's, which the file cannot tell for some CLIP weights: "gelu" for open_clip's LAION ones
    Sets the ViT's activation, norm_eps and pre_norm. Classifier, text tower and projection in the file are ignored.
    Raises WeightsError, and leaves the ViT as it was, for a file of no known family, a backbone key missing or left over, or
    a size that differs.
    """
    weights, file = _read(path)
    heads = set()  # torch's layouts do not tell their number
    if any(key.startswith("Transformer/") for key in weights):
        family, preprocessing = ("gelu_tanh", 1e-6, False), HALF
        weights, heads = _from_augreg(weights, path)
    elif any(key.startswith("visual.") for key in weights):
        family, preprocessing = ("quick_gelu", 1e-5, True), CLIP
        weights = _from_clip(weights)
        if activation is None and all(
            value.dtype != torch.float16 for value in weights.values()
        ):  # OpenAI's have halves
            warnings.warn(
                f"{path} does not tell its activation: taken to be OpenAI's QuickGELU; pass activation='gelu' for "
                "open_clip's LAION weights",
                stacklevel=2,
            )
    elif any(key.startswith("backbone.") for key in weights):
        try:
            ours = file["architecture"]["backbone"]
            family, heads = (
                (ours["activation"], ours["norm_eps"], ours["pre_norm"]),
                {ours["heads"]},
            )
            preprocessing = Preprocessing(
                file["preprocessing"]["mean"], file["preprocessing"]["std"]
            )
        except (KeyError, TypeError):
            raise WeightsError(
                f"{path} has a checkpoint's weights without its architecture or preprocessing: give the best.pt or "
                "last.pt of a run as it was written"
            ) from None
        weights = {
            key.removeprefix("backbone."): value
            for key, value in weights.items()
            if key.startswith("backbone.")
        }
    elif any(key.startswith(("patch_embed.", "blocks.")) for key in weights):
        weights = {
            key: value
            for key, value in weights.items()
            if not key.startswith(("head.", "pre_logits."))
        }
        family, preprocessing = ("gelu", 1e-6, False), HALF
        if any(key.startswith("norm_pre.") for key in weights):
            family, preprocessing = ("gelu", 1e-5, True), CLIP
            if activation is None:
                warnings.warn(
                    f"{path} does not tell its activation: taken to be timm's default, GELU; pass "
                    "activation='quick_gelu' for timm's quickgelu models",
                    stacklevel=2,
                )
    else:
        raise WeightsError(
            f"{path} holds no ViT in AugReg, timm or CLIP layout (its first keys: {_some(weights)}): give one of "
            "those, or a checkpoint of udon.py"
        )
    family = (activation or family[0], *family[1:])
    _check(vit, weights, heads, family, path)
    vit.set_family(*family)
    vit.load_state_dict(weights)
    return preprocessing


def _read(path):
    """{key: tensor} of a weight file, unwrapped from "state_dict", "model" and "module.", and the file's whole content."""
    try:
        if str(path).endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}, None
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path), None
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch.jit.load is deprecated; OpenAI's archives are of that kind
            if _is_torchscript(path):
                content = torch.jit.load(path, map_location="cpu").state_dict()
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise WeightsError(
            f"{path} needs the package safetensors: pip install safetensors"
        ) from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be opened: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path} holds other Python objects than tensors, or is no weight file: save a state dict to "
            "it"
        ) from None
    except Exception as error:  # zip, numpy, torch and safetensors have no error in common
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{path} is no weight file that can be read ({reason}): give a .npz, .safetensors, .pt or .pth "
            "file of weights"
        ) from None
    weights = content
    for wrapper in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    if not isinstance(weights, dict):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}: give a file that holds a state dict"
        )
    return {
        key.removeprefix("module."): value
        for key, value in weights.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }, content


def _is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


_BLOCK = r"Transformer/encoderblock_(\d+)/"
_ATTENTION = (
    _BLOCK + r"MultiHeadDotProductAttention_[01]/"
)  # _1, LayerNorm_2, MlpBlock_3; in later versions _0, _1, _0
_AUGREG = (  # key, timm's name, dimensions, (in, out) -> (out, in)
    (r"cls", "cls_token", 3, None),
    (r"Transformer/posembed_input/pos_embedding", "pos_embed", 3, None),
    (
        r"embedding/kernel",
        "patch_embed.proj.weight",
        4,
        lambda x: x.permute(3, 2, 0, 1),
    ),  # HWIO -> OIHW
    (r"embedding/bias", "patch_embed.proj.bias", 1, None),
    (r"Transformer/encoder_norm/scale", "norm.weight", 1, None),
    (r"Transformer/encoder_norm/bias", "norm.bias", 1, None),
    (_BLOCK + r"LayerNorm_0/scale", r"blocks.\1.norm1.weight", 1, None),
    (_BLOCK + r"LayerNorm_0/bias", r"blocks.\1.norm1.bias", 1, None),
    (_BLOCK + r"LayerNorm_[12]/scale", r"blocks.\1.norm2.weight", 1, None),
    (_BLOCK + r"LayerNorm_[12]/bias", r"blocks.\1.norm2.bias", 1, None),
    (
        _ATTENTION + r"(query|key|value)/kernel",
        r"blocks.\1.attn.\2.weight",
        3,
        lambda x: x.flatten(1).T,
    ),
    (_ATTENTION + r"(query|key|value)/bias", r"blocks.\1.attn.\2.bias", 2, lambda x: x.flatten()),
    (_ATTENTION + r"out/kernel", r"blocks.\1.attn.proj.weight", 3, lambda x: x.flatten(0, 1).T),
    (_ATTENTION + r"out/bias", r"blocks.\1.attn.proj.bias", 1, None),
    (_BLOCK + r"MlpBlock_[03]/Dense_0/kernel", r"blocks.\1.mlp.fc1.weight", 2, lambda x: x.T),
    (_BLOCK + r"MlpBlock_[03]/Dense_0/bias", r"blocks.\1.mlp.fc1.bias", 1, None),
    (_BLOCK + r"MlpBlock_[03]/Dense_1/kernel", r"blocks.\1.mlp.fc2.weight", 2, lambda x: x.T),
    (_BLOCK + r"MlpBlock_[03]/Dense_1/bias", r"blocks.\1.mlp.fc2.bias", 1, None),
)


def _from_augreg(weights, path):
    """AugReg's arrays under timm's names (any others under their own), and the set of their numbers of attention heads."""
    renamed, heads = {}, set()
    for key, value in weights.items():
        if key.startswith(("head/", "pre_logits/")):
            continue
        name = key
        for pattern, template, dimensions, transform in _AUGREG:
            if match := re.fullmatch(pattern, key):
                if value.ndim != dimensions:
                    raise WeightsError(
                        f"{path} has {key} of shape {tuple(value.shape)}: {dimensions} dimensions are needed"
                    )
                if key.endswith("query/kernel"):
                    heads.add(value.shape[1])
                name, value = match.expand(template), transform(value) if transform else value
        if name in renamed:
            raise WeightsError(
                f"{path} has {key} and another array for {name}: give a file of one version"
            )
        renamed[name] = value
    for query in [name for name in renamed if ".attn.query." in name]:
        parts = [query.replace("query", part) for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):  # otherwise attn.qkv is reported as missing
            renamed[query.replace("query", "qkv")] = torch.cat(
                [renamed.pop(part) for part in parts]
            )
    return renamed, heads


def _from_clip(weights):
    """The image tower of an OpenAI / open_clip state dict under timm's names."""
    renamed = {}
    for key, value in weights.items():
        if not key.startswith("visual.") or key == "visual.proj":
            continue
        name = key.removeprefix("visual.")
        for old, new in (
            ("class_embedding", "cls_token"),
            ("positional_embedding", "pos_embed"),
            ("conv1.", "patch_embed.proj."),
            ("ln_pre.", "norm_pre."),
            ("ln_post.", "norm."),
            ("transformer.resblocks.", "blocks."),
            (".ln_1.", ".norm1."),
            (".ln_2.", ".norm2."),
            (".attn.in_proj_", ".attn.qkv."),
            (".attn.out_proj.", ".attn.proj."),
            (".mlp.c_fc.", ".mlp.fc1."),
            (".mlp.c_proj.", ".mlp.fc2."),
        ):
            name = name.replace(old, new)
        renamed[name] = value
    for name, dimensions in (
        ("cls_token", 1),
        ("pos_embed", 2),
    ):  # (D,) -> (1, 1, D), (N+1, D) -> (1, N+1, D)
        if name in renamed and renamed[name].ndim == dimensions:
            renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
    return renamed


def _check(vit, weights, heads, family, path):
    """Resizes the position table within `weights` and makes sure that they fill a ViT of `family` exactly."""
    expected = {key: value.shape for key, value in vit.state_dict().items()}
    width, stem = vit.architecture["width"], vit.architecture["stem"]
    for key in ("norm_pre.weight", "norm_pre.bias", "patch_embed.proj.bias"):
        expected.pop(key, None)
    if family[2]:
        expected |= {"norm_pre.weight": (width,), "norm_pre.bias": (width,)}
    elif stem == "patch":
        expected |= {"patch_embed.proj.bias": (width,)}
    if missing := sorted(expected.keys() - weights.keys()):
        raise WeightsError(
            f"{path} lacks {len(missing)} keys of the backbone ({_some(missing)}): give a whole file, or a model of "
            "its depth and stem"
        )
    if left_over := sorted(weights.keys() - expected.keys()):
        raise WeightsError(
            f"{path} has {len(left_over)} keys that the backbone does not know ({_some(left_over)}): give a file "
            "of the backbone's family and depth"
        )
    if heads - {vit.architecture["heads"]}:
        raise WeightsError(
            f"{path} has {sorted(heads)} attention heads, the model {vit.architecture['heads']}: choose the model's "
            "size after the file"
        )
    table, shape = weights["pos_embed"], expected["pos_embed"]
    if table.ndim == 3 and table.shape[1] != shape[1]:
        old, new = (round(max(tokens - 1, 0) ** 0.5) for tokens in (table.shape[1], shape[1]))
        if old < 1 or old * old != table.shape[1] - 1:
            raise WeightsError(
                f"{path} has pos_embed of {table.shape[1]} rows: 1 + a square number is needed"
            )
        weights["pos_embed"] = resize_position_table(table, new)
        warnings.warn(
            f"position table of {path} resized from {old} x {old} to {new} x {new}", stacklevel=3
        )
    for key, wanted in expected.items():
        if tuple(weights[key].shape) != tuple(wanted):
            raise WeightsError(
                f"{path} has {key} of shape {tuple(weights[key].shape)}, the model {tuple(wanted)}: choose the "
                "model's size after the file"
            )


def resize_position_table(table, grid):
    """(1, 1 + n*n, D) -> (1, 1 + grid*grid, D) float32: the CLS row kept, the others resized (bicubic, antialiased)."""
    table = table.float()
    n = round((table.shape[1] - 1) ** 0.5)
    cls, rest = table[:, :1], table[:, 1:]
    rest = rest.unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    rest = F.interpolate(rest, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([cls, rest.flatten(2).transpose(1, 2)], dim=1)


def _some(keys):
    keys = list(keys)
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")


def main(arguments):
    try:
        if len(arguments) != 2:
            raise WeightsError(
                f"{len(arguments)} arguments were given: give two, RUN/best.pt and the file to write"
            )
        source, target = arguments
        weights, file = _read(source)
        try:
            kept = {
                "model": {
                    key: value.half()
                    for key, value in weights.items()
                    if key.startswith("backbone.")
                },
                "architecture": {"backbone": file["architecture"]["backbone"]},
                "preprocessing": file["preprocessing"],
            }
        except (KeyError, TypeError):
            raise WeightsError(
                f"{source} is no checkpoint of udon.py: give a best.pt or last.pt"
            ) from None
        if os.path.isdir(target) or not os.path.isdir(os.path.dirname(target) or "."):
            raise WeightsError(f"{target} cannot be written: give a file in a folder that exists")
        torch.save(kept, f"{target}.partial")
        os.replace(f"{target}.partial", target)
    except (WeightsError, OSError, RuntimeError) as error:
        print(f"pretrained.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
