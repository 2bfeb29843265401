"""Reads public ViT weights into model.ViT.    Copy with: torch and numpy (safetensors for .safetensors files).

    load(vit, path) -> Preprocessing(mean, std)    fills the ViT in place, all of it or nothing

Three families, told apart by the file's own keys; each fixes the activation, the LayerNorm epsilon, whether there is a norm
before the blocks, and the statistics its images were normalised with. All of that is set here, and none of it by the user,
because getting it wrong is silent.

    AugReg   .npz of the JAX ViT code (arXiv:2106.10270)     gelu_tanh   1e-6   mean and std 0.5
    timm     vit_* state dict                                gelu        1e-6   mean and std 0.5
             vit_*_clip_* (has norm_pre)                     gelu        1e-5   CLIP's
    CLIP     OpenAI / open_clip, keys `visual.*`             quick_gelu  1e-5   CLIP's
"""

import re
import warnings
import zipfile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class WeightsError(ValueError):
    """The file cannot fill the ViT; the message is one sentence that names the keys or shapes and the remedy."""


class Preprocessing(NamedTuple):
    mean: tuple        # per channel R, G, B, of images in [0, 1]
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
    weights = _read(path)
    heads = None                                             # torch's layouts do not tell their number
    if "Transformer/encoder_norm/scale" in weights:
        family, preprocessing = ("gelu_tanh", 1e-6, False), HALF
        weights, heads = _from_augreg(weights)
    elif any(key.startswith("visual.") for key in weights):
        family, preprocessing = ("quick_gelu", 1e-5, True), CLIP
        weights = _from_clip(weights)
        if activation is None and all(value.dtype != torch.float16 for value in weights.values()):      # OpenAI's have halves
            warnings.warn(f"{path} does not tell its activation: taken to be OpenAI's QuickGELU; pass activation='gelu' for "
                          "open_clip's LAION weights", stacklevel=2)
    elif "patch_embed.proj.weight" in weights:
        weights = {key: value for key, value in weights.items() if not key.startswith(("head.", "pre_logits."))}
        family, preprocessing = ("gelu", 1e-6, False), HALF
        if "norm_pre.weight" in weights:
            family, preprocessing = ("gelu", 1e-5, True), CLIP
            if activation is None:
                warnings.warn(f"{path} does not tell its activation: taken to be timm's default, GELU; pass "
                              "activation='quick_gelu' for timm's quickgelu models", stacklevel=2)
    else:
        raise WeightsError(f"{path} holds no ViT in AugReg, timm or CLIP layout (its first keys: {_some(weights)}): give one of "
                           "those")
    family = (activation or family[0], *family[1:])
    _check(vit, weights, heads, family, path)
    vit.set_family(*family)
    vit.load_state_dict(weights)
    return preprocessing


def _read(path):
    """{key: tensor} of a weight file, unwrapped from "state_dict", "model" and "module."."""
    try:
        if str(path).endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                # torch.jit.load is deprecated; OpenAI's archives are of that kind
            if _is_torchscript(path):
                content = torch.jit.load(path, map_location="cpu").state_dict()
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise WeightsError(f"{path} needs the package safetensors: pip install safetensors") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be opened: {error.strerror or error}") from None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path} is no weight file that can be read ({reason}): give a .npz, .safetensors, .pt or .pth "
                           "file of weights") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}: give a file that holds a state dict")
    return {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, torch.Tensor)}


def _is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _from_augreg(weights):
    """AugReg's arrays under timm's names, and the number of attention heads. Kernels are (in, out): torch's are (out, in)."""
    weights = {key: value for key, value in weights.items() if not key.startswith(("head/", "pre_logits/"))}
    renamed, heads = {}, None
    names = {"cls": "cls_token", "Transformer/posembed_input/pos_embedding": "pos_embed",
             "Transformer/encoder_norm/scale": "norm.weight", "Transformer/encoder_norm/bias": "norm.bias",
             "embedding/kernel": "patch_embed.proj.weight", "embedding/bias": "patch_embed.proj.bias"}
    qkv = {}                                                       # {(block, "weight" or "bias"): {"query": ..., ...}}
    for key, value in weights.items():
        kernel = key.endswith("/kernel")
        leaf = "bias" if key.endswith("/bias") else "weight"
        inside = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)/(?:kernel|bias|scale)", key)
        if key in names:
            renamed[names[key]] = value.permute(3, 2, 0, 1) if kernel else value                 # HWIO -> OIHW
        elif not inside:
            renamed[key] = value                                                                 # reported as left over
        else:
            block, module = f"blocks.{inside[1]}", inside[2]
            attention = re.fullmatch(r"MultiHeadDotProductAttention_\d+/(query|key|value|out)", module)
            if attention and attention[1] == "out":
                renamed[f"{block}.attn.proj.{leaf}"] = value.flatten(0, 1).T if kernel else value
            elif attention:
                heads = value.shape[-2]
                qkv.setdefault((block, leaf), {})[attention[1]] = value.flatten(1).T if kernel else value.flatten()
            elif module in ("MlpBlock_3/Dense_0", "MlpBlock_0/Dense_0", "MlpBlock_3/Dense_1", "MlpBlock_0/Dense_1"):
                renamed[f"{block}.mlp.fc{int(module[-1]) + 1}.{leaf}"] = value.T if kernel else value
            elif re.fullmatch(r"LayerNorm_[012]", module):         # norm2 is LayerNorm_2, in other versions LayerNorm_1
                renamed[f"{block}.norm{1 if module[-1] == '0' else 2}.{leaf}"] = value
            else:
                renamed[key] = value
    for (block, leaf), parts in qkv.items():
        if len(parts) == 3:                                        # otherwise attn.qkv is reported as missing
            renamed[f"{block}.attn.qkv.{leaf}"] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return renamed, heads


def _from_clip(weights):
    """The image tower of an OpenAI / open_clip state dict under timm's names."""
    renamed = {}
    for key, value in weights.items():
        if not key.startswith("visual.") or key == "visual.proj":
            continue
        name = key.removeprefix("visual.")
        for old, new in (("class_embedding", "cls_token"), ("positional_embedding", "pos_embed"),
                         ("conv1.", "patch_embed.proj."), ("ln_pre.", "norm_pre."), ("ln_post.", "norm."),
                         ("transformer.resblocks.", "blocks."), (".ln_1.", ".norm1."), (".ln_2.", ".norm2."),
                         (".attn.in_proj_", ".attn.qkv."), (".attn.out_proj.", ".attn.proj."),
                         (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2.")):
            name = name.replace(old, new)
        renamed[name] = value
    for name, dimensions in (("cls_token", 1), ("pos_embed", 2)):            # (D,) -> (1, 1, D), (N+1, D) -> (1, N+1, D)
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
        raise WeightsError(f"{path} lacks {len(missing)} keys of the backbone ({_some(missing)}): give a whole file, or a model of "
                           "its depth and stem")
    if left_over := sorted(weights.keys() - expected.keys()):
        raise WeightsError(f"{path} has {len(left_over)} keys that the backbone does not know ({_some(left_over)}): give a file "
                           "of the backbone's family and depth")
    if heads not in (None, vit.architecture["heads"]):
        raise WeightsError(f"{path} has {heads} attention heads, the model {vit.architecture['heads']}: choose the model's size "
                           "after the file")
    table, shape = weights["pos_embed"], expected["pos_embed"]
    if table.ndim == 3 and table.shape[1] != shape[1]:
        old, new = (round((tokens - 1) ** 0.5) for tokens in (table.shape[1], shape[1]))
        if old * old != table.shape[1] - 1:
            raise WeightsError(f"{path} has a position table of {table.shape[1]} rows: 1 + a square number is needed")
        weights["pos_embed"] = resize_position_table(table, new)
        warnings.warn(f"position table of {path} resized from {old} x {old} to {new} x {new}", stacklevel=3)
    for key, wanted in expected.items():
        if tuple(weights[key].shape) != tuple(wanted):
            raise WeightsError(f"{path} has {key} of shape {tuple(weights[key].shape)}, the model {tuple(wanted)}: choose the "
                               "model's size after the file")


def resize_position_table(table, grid):
    """(1, 1 + n*n, D) -> (1, 1 + grid*grid, D) float32: the CLS row kept, the others resized (bicubic, antialiased)."""
    table = table.float()
    n = round((table.shape[1] - 1) ** 0.5)
    cls, rest = table[:, :1], table[:, 1:]
    rest = rest.unflatten(1, (n, n)).permute(0, 3, 1, 2)                                         # (1, D, n, n)
    rest = F.interpolate(rest, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([cls, rest.flatten(2).transpose(1, 2)], dim=1)


def _some(keys):
    keys = list(keys)
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
