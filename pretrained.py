"""Loads public ViT weights into `model.ViT`.

    load(vit, path, *, activation=None, statistics=None) -> Preprocessing
    STATISTICS  {name: Preprocessing}: "half", "imagenet", "clip"
    COMPACT     {size: path} of the project's own weights

    python pretrained.py RUN/best.pt FILE.pt    extracts a run's backbone, in half precision

A family of weights is recognised by its keys. It determines the activation, the LayerNorm epsilon,
whether a norm precedes the blocks, and the mean and std of the images. `load` sets all of them and
warns about each that the file cannot tell, because a wrong one lowers accuracy without an error.

    AugReg  .npz of the JAX ViT code (arXiv:2106.10270)   gelu_tanh   1e-6  half
    timm    vit_* state dicts                             gelu        1e-6  half (assumed)
            with decoder_* keys (MAE) or a "teacher"      gelu        1e-6  imagenet (assumed)
            vit_*_clip_*, which have norm_pre             gelu        1e-5  clip
    CLIP    OpenAI and open_clip, keys visual.*           quick_gelu  1e-5  clip
            open_clip around timm, keys visual.trunk.*    gelu        1e-6  clip (assumed)
    HF      transformers' ViTModel                        gelu        1e-12 half (assumed)
            transformers' CLIPModel, CLIPVisionModel      quick_gelu  1e-5  clip
    Flax    CLIP in Scenic                                quick_gelu  1e-5  clip
    own     checkpoints of udon.py                        as stored in the checkpoint

DINO, DeiT and MAE encoders have the keys of timm's or transformers' ViT but were trained with
"imagenet" statistics: pass them, or keep the configuration files beside the weights.
Copy with: torch, numpy (and safetensors for .safetensors files).
"""

import json
import math
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPACT = {name: Path(__file__).with_name("weights") / f"{name}.pt" for name in ("micro", "mini")}


class WeightsError(ValueError):
    """The weights cannot be loaded; one sentence with the file, the reason and the remedy."""


class Preprocessing(NamedTuple):
    """Statistics that images in [0, 1] are normalised with, per channel R, G, B; and how they are
    resized: "bilinear", or for models of timm also "bicubic" or "lanczos"."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bilinear"


HALF = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
STATISTICS = {"half": HALF, "imagenet": IMAGENET, "clip": CLIP}


class Family(NamedTuple):
    """What a family of weights fixes besides the weights."""

    name: str
    activation: str
    norm_eps: float
    pre_norm: bool
    preprocessing: Preprocessing
    caution: str = ""  # when the assumptions do not hold
    activation_source: str = "assumed"
    preprocessing_source: str = "assumed"
    heads: int | None = None  # attention heads, where the file tells


# A family, with what its files cannot tell marked as assumed.
AUGREG = Family("AugReg", "gelu_tanh", 1e-6, False, HALF, "", "by family", "by family")
MAE = Family("MAE", "gelu", 1e-6, False, IMAGENET)
DINO = Family("DINO-like", "gelu", 1e-6, False, IMAGENET)
IMAGENET_CAUTION = "DINO, DeiT and MAE encoders have the same keys and need statistics 'imagenet'"
TIMM = Family("timm ViT", "gelu", 1e-6, False, HALF, IMAGENET_CAUTION)
TIMM_CLIP_CAUTION = "timm's quickgelu models need activation 'quick_gelu'"
TIMM_CLIP = Family("timm CLIP", "gelu", 1e-5, True, CLIP, TIMM_CLIP_CAUTION)
OPENAI = Family("OpenAI CLIP", "quick_gelu", 1e-5, True, CLIP, "", "by family", "by family")
OPEN_CLIP_CAUTION = "open_clip's LAION weights need activation 'gelu', some also statistics 'half'"
OPEN_CLIP = Family("CLIP", "quick_gelu", 1e-5, True, CLIP, OPEN_CLIP_CAUTION)
TRUNK_CAUTION = "open_clip's models around timm have statistics 'clip', 'half' or 'imagenet'"
TRUNK = Family("open_clip's timm ViT", "gelu", 1e-6, False, CLIP, TRUNK_CAUTION, "by family")
HF_VIT = Family("HF ViT", "gelu", 1e-12, False, HALF, IMAGENET_CAUTION)
HF_CLIP = Family("HF CLIP", "quick_gelu", 1e-5, True, CLIP, OPEN_CLIP_CAUTION)
FLAX_CLIP = OPENAI._replace(name="Flax CLIP")


class Layout(NamedTuple):
    """How the keys of a family are recognised and renamed to timm's."""

    marks: tuple[str, ...]  # prefixes that only this layout has
    ignored: tuple[str, ...]  # prefixes of keys outside the backbone
    cls_token: str
    pooling: tuple[str, ...]  # prefixes of keys of networks that pool their patches
    names: tuple[tuple[str, str], ...] = ()  # pattern and replacement, applied in this order
    tower: str = ""  # prefix of all keys of the backbone


AUGREG_NAMES = (  # LayerNorm_2, MultiHead..._1 and MlpBlock_3 end in _1, _0 and _0 in later files
    (r"^cls$", "cls_token"),
    (r"^embedding/", "patch_embed.proj/"),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_", "blocks/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_[12]/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_[01]/out/", "/attn/proj/"),
    (r"/MultiHeadDotProductAttention_[01]/", "/attn/"),
    (r"/MlpBlock_[03]/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_[03]/Dense_1/", "/mlp/fc2/"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/", "."),
)
CLIP_NAMES = (
    (r"^visual\.", ""),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out(_proj)?\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
HF_NAMES = (  # transformers renamed parts of ViTModel in version 5, in memory but not in its files
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^embeddings\.(patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),  # sic
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^(encoder\.layers?|layers)\.", "blocks."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(attention\.attention|attention|self_attn)\.(query|q_proj)\.", ".attn.query."),
    (r"\.(attention\.attention|attention|self_attn)\.(key|k_proj)\.", ".attn.key."),
    (r"\.(attention\.attention|attention|self_attn)\.(value|v_proj)\.", ".attn.value."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
LAYOUTS = {
    "AugReg": Layout(
        ("Transformer/",), ("head/", "pre_logits/"), "cls", ("MAPHead_0/",), AUGREG_NAMES
    ),
    "Flax CLIP": Layout(
        ("transformer/resblocks.",),
        ("proj/",),
        "class_embedding",
        (),
        ((r"/(kernel|scale)$", "/weight"), (r"/", "."), *CLIP_NAMES),
    ),
    "open_clip timm": Layout(
        ("visual.trunk.",),
        ("visual.head.",),
        "visual.trunk.cls_token",
        ("visual.trunk.fc_norm.", "visual.trunk.attn_pool."),
        ((r"^visual\.trunk\.", ""),),
        "visual.",
    ),
    "CLIP": Layout(
        ("visual.",),
        ("visual.proj",),
        "visual.class_embedding",
        ("visual.attn_pool.",),
        CLIP_NAMES,
        "visual.",
    ),
    "CLIP tower": Layout(
        ("transformer.resblocks.",), ("proj",), "class_embedding", ("attn_pool.",), CLIP_NAMES
    ),
    "HF ViT": Layout(
        ("embeddings.patch_embeddings.",),
        ("embeddings.mask_token", "pooler."),
        "embeddings.cls_token",
        (),
        HF_NAMES,
    ),
    "HF CLIP": Layout(
        ("embeddings.patch_embedding.",),
        ("embeddings.position_ids",),
        "embeddings.class_embedding",
        (),
        HF_NAMES,
    ),
    "timm": Layout(
        ("patch_embed.", "blocks."),
        ("head.", "pre_logits.", "decoder_", "mask_token"),
        "cls_token",
        ("fc_norm.", "attn_pool."),
    ),
}


def load(
    vit: nn.Module,
    path: str | os.PathLike,
    *,
    activation: str | None = None,
    statistics: str | None = None,
) -> Preprocessing:
    """Fills `vit`, a model.ViT or a timm_backbone.TimmBackbone, in place and returns the
    preprocessing that its images need.

    path        .npz (AugReg), .safetensors, a file for torch.load(weights_only=True) or
                torch.jit.load, or a folder with one of WEIGHT_FILES, such as save_pretrained
                writes. State dicts may be wrapped ("state_dict", "model", ...; averaged weights
                come before raw ones) or have prefixes such as "module.".
    activation  overrides the family's activation
    statistics  a key of STATISTICS, overrides the family's mean and std
    Without these, config.json (timm, transformers), preprocessor_config.json and
    open_clip_config.json beside the file are read. A warning names the recognised family and where
    activation and statistics come from; checkpoints of this project need none. Another warning says
    that the position table was resized to the ViT's grid. A TimmBackbone has an activation, an
    interpolation and, unless given, statistics of its own, or those of the checkpoint that fills
    it; nothing is noted.
    Sets the ViT's activation, norm_eps and pre_norm. Heads and text towers are ignored.
    Raises WeightsError, and leaves the ViT unchanged, for files of another kind, missing or unknown
    keys, shapes other than the ViT's, and tensors that are not finite floating-point numbers.
    """
    path = Path(path)
    try:
        path = _weight_file(path)
        if statistics is not None and statistics not in STATISTICS:
            raise WeightsError(f"statistics {statistics!r} are unknown: use one of {[*STATISTICS]}")
        if "timm" in vit.architecture:
            return _load_timm(vit, path, activation, statistics)
        checkpoint = _read(path)
        family, weights = recognise(checkpoint)
        notes = []
        if not checkpoint.is_own:
            family = _with_configs(family, path, width=weights["cls_token"].numel())
        if activation is not None:
            family = family._replace(activation=activation, activation_source="given")
        if statistics is not None:
            preprocessing = STATISTICS[statistics]
            family = family._replace(preprocessing=preprocessing, preprocessing_source="given")
        if not checkpoint.is_own:
            notes.append(_describe(family, checkpoint.wrappers))
        notes += fit(vit, weights, family)
        for note in notes:
            warnings.warn(f"{path}: {note}", stacklevel=2)
        vit.set_family(family.activation, family.norm_eps, family.pre_norm)
    except ValueError as error:  # WeightsError, or the ViT's own
        raise WeightsError(message(path, error)) from None
    vit.load_state_dict(weights)
    return family.preprocessing


def _load_timm(
    backbone: nn.Module, path: Path, activation: str | None, statistics: str | None
) -> Preprocessing:
    """`load` for a timm_backbone.TimmBackbone."""
    if activation is not None:
        raise WeightsError(f"activation is {activation}, but {backbone.name} has its own: omit it")
    checkpoint = _read(path, backbone.network.state_dict().keys())
    counters = "num_batches_tracked"  # of BatchNorm, integers
    check_tensors({k: v for k, v in checkpoint.weights.items() if not k.endswith(counters)})
    if checkpoint.is_own:
        own = _own_preprocessing(checkpoint.content, backbone.architecture["timm"])
    else:
        own = Preprocessing(*backbone.statistics, backbone.interpolation)
    backbone.fill(checkpoint.weights)
    return STATISTICS.get(statistics, own)._replace(interpolation=own.interpolation)


def resize_position_table(table: Tensor, grid: int) -> Tensor:
    """(1, 1 + n*n, D) -> (1, 1 + grid*grid, D) float32, by antialiased bicubic interpolation.

    The row of the CLS token, the first one, is kept.
    """
    table = table.float()
    n = math.isqrt(table.shape[1] - 1)
    cls, rest = table[:, :1], table[:, 1:]
    rest = rest.unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    rest = F.interpolate(rest, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([cls, rest.flatten(2).transpose(1, 2)], dim=1)


# ---- reading a file ------------------------------------------------------------------------------

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")  # averaged ones first
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "backbone.", "network."),
    *("vision_model.", "vit."),  # transformers
    *("params/", "opt/target/"),  # Flax, saved as npz
    "visual.trunk.",  # open_clip around timm
)
INDEX = ".index.json"  # of weights in parts
CLS_REMEDY = "give weights of a network that reads the CLS token, or use --model timm:NAME"


WEIGHT_FILES = (  # in a folder of transformers, open_clip or timm
    *("model.safetensors", "pytorch_model.bin"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)


class Checkpoint(NamedTuple):
    content: Any  # the whole file
    weights: dict[str, Tensor]  # without wrappers and prefixes
    wrappers: tuple[str, ...] = ()  # around the weights, outermost first
    is_torchscript: bool = False
    is_own: bool = False  # a checkpoint of udon.py


def _weight_file(path: Path) -> Path:
    """The file of weights in a folder; `path` itself if it is none."""
    if not path.is_dir():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
        if (path / f"{name}{INDEX}").is_file():
            return path / f"{name}{INDEX}"
    raise WeightsError(
        f"this folder has no weights, {_some(WEIGHT_FILES)}: give a weight file, or a folder with "
        "one of these"
    )


def _read(path: Path, names: Collection[str] = ()) -> Checkpoint:
    """`names`: keys of the network that the weights are for; without them, a layout is found."""
    if path.name.endswith(INDEX):
        return _unwrap(_read_parts(path), False, names)
    return _unwrap(*_read_file(path), names)


def _read_parts(path: Path) -> dict[str, Tensor]:
    """The tensors of the files beside an index of transformers that it names."""
    files = _read_json(path).get("weight_map")
    files = list(files.values()) if isinstance(files, dict) else []
    plain = (isinstance(name, str) and name not in ("", "..") for name in files)
    if not files or not all(plain) or any(Path(name).name != name for name in files):
        raise WeightsError(
            f"{path.name} names no files of its folder, in weight_map: download it again"
        )
    tensors = {}
    for name in sorted(set(files)):
        try:
            content, _ = _read_file(path.with_name(name))
        except WeightsError as error:
            raise WeightsError(f"its part {name!r}: {error}") from None
        tensors |= content if isinstance(content, dict) else {}
    return tensors


def _read_file(path: Path) -> tuple[Any, bool]:
    """What a file holds, and whether it is TorchScript."""
    _refuse_other_formats(path)
    is_torchscript = False
    try:
        _check_checksums(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                content = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            is_torchscript = _is_torchscript(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit.load is deprecated
                if is_torchscript:
                    content = torch.jit.load(path, map_location="cpu").state_dict()
                else:
                    content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise WeightsError(
            "the package safetensors is missing: pip install -e '.[interop]'"
        ) from None
    except pickle.UnpicklingError:
        raise WeightsError(
            "not a weight file, or it holds other objects than tensors: save a state dict to it"
        ) from None
    except Exception as error:  # zip, numpy, torch and safetensors share no exception class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"not a readable weight file ({reason}): give a .npz, .safetensors, .pt or .pth file"
        ) from None
    return content, is_torchscript


def _refuse_other_formats(path: Path) -> None:
    try:
        if path.exists() and not path.is_file():
            raise WeightsError("this is no regular file: give a weight file or a folder with one")
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        reason = error.strerror or error
        raise WeightsError(f"cannot be opened ({reason}): check the path") from None
    if not head:
        raise WeightsError("the file is empty: download it again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError("this is a git-lfs pointer, not the weights: run git lfs pull")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html")):
        raise WeightsError("this is a web page: download the file that the page links to")
    is_msgpack = re.match(rb"([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9]", head, re.DOTALL)
    if is_msgpack or path.suffix == ".msgpack":
        raise WeightsError(
            "this is Flax msgpack: give the model's PyTorch or .npz weights; python "
            "flax_weights.py converts the official checkpoints of UDON and UnED"
        )
    if head.startswith(b"\x89HDF"):
        raise WeightsError("this is HDF5, from Keras: give the model's PyTorch or .npz weights")


def _check_checksums(path: Path) -> None:
    """Raises ValueError for a damaged zip archive; torch.load does not read the checksums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} has a wrong checksum")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _unwrap(content: Any, is_torchscript: bool, names: Collection[str]) -> Checkpoint:
    values, wrappers = content, ()
    while isinstance(values, dict) and len(wrappers) < 4:  # a dict can contain itself
        name = next((name for name in WRAPPERS if isinstance(values.get(name), dict)), None)
        if name is None:
            break
        values, wrappers = values[name], (*wrappers, name)
    if not isinstance(values, dict):
        raise WeightsError(f"it holds a {type(content).__name__}: give a file with a state dict")
    weights = {
        key: value
        for key, value in values.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    is_own = any(key.startswith("backbone.") for key in weights) and (
        "architecture" in content or any(key.startswith("student_head.") for key in weights)
    )
    first_keys = _some(weights)
    while not (weights.keys() & names if names else _layout(weights)):
        prefixes = [p for p in PREFIXES if any(key.startswith(p) for key in weights)]
        if not prefixes and names:
            break  # the caller may know these keys
        if not prefixes:
            raise WeightsError(
                f"no ViT in a layout of AugReg, timm, CLIP or transformers (first keys: "
                f"{first_keys}): give one of these, or a checkpoint of udon.py"
            )
        weights = {
            key.removeprefix(prefixes[0]): value
            for key, value in weights.items()
            if key.startswith(prefixes[0])
        }
    return Checkpoint(content, weights, wrappers, is_torchscript, is_own)


def _layout(weights: dict[str, Tensor]) -> str | None:
    for name, layout in LAYOUTS.items():
        if any(key.startswith(layout.marks) for key in weights):
            return name
    return None


# ---- recognising the family ----------------------------------------------------------------------


def recognise(checkpoint: Checkpoint) -> tuple[Family, dict[str, Tensor]]:
    """The family, and the backbone's tensors under timm's names. Raises WeightsError."""
    name = _layout(checkpoint.weights)
    layout = LAYOUTS[name]
    weights = {
        key: value
        for key, value in checkpoint.weights.items()
        if key.startswith(layout.tower) and not key.startswith(layout.ignored)
    }
    if layout.cls_token not in weights:
        raise WeightsError(f"there is no CLS token, {layout.cls_token}: {CLS_REMEDY}")
    if pooling := [key for key in weights if key.startswith(layout.pooling)]:
        raise WeightsError(f"{_some(pooling)} belong to a network that pools patches: {CLS_REMEDY}")
    check_tensors(weights)
    if checkpoint.is_own:
        return _own_family(checkpoint.content), weights
    weights, heads = _to_timm(weights, layout)
    has_pre_norm = any(key.startswith("norm_pre.") for key in weights)
    if name in ("CLIP", "CLIP tower") and not has_pre_norm:  # CLIPA
        raise WeightsError(
            f"{layout.tower}ln_pre is missing, as in networks that pool: {CLS_REMEDY}"
        )
    families = {
        "AugReg": AUGREG,
        "Flax CLIP": FLAX_CLIP,
        "open_clip timm": TIMM_CLIP if has_pre_norm else TRUNK,
        "CLIP": OPENAI if checkpoint.is_torchscript else OPEN_CLIP,
        "CLIP tower": OPEN_CLIP,
        "HF ViT": HF_VIT,
        "HF CLIP": HF_CLIP,
        "timm": TIMM_CLIP if has_pre_norm else TIMM,
    }
    family = families[name]
    if family == TIMM and any(key.startswith("decoder_") for key in checkpoint.weights):
        family = MAE
    elif family == TIMM and "teacher" in checkpoint.wrappers:
        family = DINO
    return family._replace(heads=heads), weights


def check_tensors(weights: dict[str, Tensor]) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for key, value in weights.items():
        if value.layout != torch.strided or value.is_nested:
            problem = "is sparse or nested"
        elif value.dtype not in dtypes:
            problem = f"has dtype {value.dtype}"
        elif value.is_meta:
            problem = "is on the meta device, without values"
        elif value.untyped_storage().nbytes() < value.numel() * value.element_size():
            problem = f"has shape {tuple(value.shape)}, but fewer values in the file"
        elif not value.float().isfinite().all():
            problem = "has NaN or infinite values"
        elif value.ndim and not value.shape[-1]:
            problem = f"has shape {tuple(value.shape)}"
        else:
            continue
        raise WeightsError(f"{key} {problem}: dense, finite floating-point weights are needed")


def _own_family(content: Any) -> Family:
    try:
        if "timm" in content["architecture"]["backbone"]:
            raise WeightsError("a checkpoint of a timm model: give the --model it was trained with")
        backbone, statistics = content["architecture"]["backbone"], content["preprocessing"]
        preprocessing = _preprocessing({"mean": statistics["mean"], "std": statistics["std"]})
        names = ("activation", "norm_eps", "pre_norm", "heads")
        activation, norm_eps, pre_norm, heads = (backbone[name] for name in names)
    except (KeyError, TypeError):
        raise WeightsError(
            "a checkpoint's weights without its architecture or preprocessing: give the best.pt or "
            "last.pt of a run as it was written"
        ) from None
    is_valid = isinstance(activation, str) and isinstance(pre_norm, bool) and preprocessing
    if not (is_valid and isinstance(norm_eps, float) and 0 < norm_eps < 1):
        raise WeightsError(
            f"the architecture or preprocessing is invalid ({backbone}, {statistics}): give the "
            "best.pt or last.pt of a run as it was written"
        )
    return Family("own", activation, norm_eps, pre_norm, preprocessing, heads=heads)


def _own_preprocessing(content: Any, name: str) -> Preprocessing:
    """Of a checkpoint with the timm model `name` as its backbone."""
    try:
        is_same = content["architecture"]["backbone"]["timm"] == name
        preprocessing = _preprocessing(content["preprocessing"]) if is_same else None
        interpolation = content["preprocessing"].get("interpolation", "bilinear")  # older: absent
    except (KeyError, TypeError, AttributeError):
        preprocessing = None
    if preprocessing is None or interpolation not in ("bilinear", "bicubic", "lanczos"):
        raise WeightsError(f"not a checkpoint with timm:{name} as its backbone: give one")
    return preprocessing._replace(interpolation=interpolation)


def _describe(family: Family, wrappers: tuple[str, ...]) -> str:
    place = f" in {'.'.join(wrappers)!r}" if wrappers else ""
    names = [name for name, value in STATISTICS.items() if value == family.preprocessing]
    statistics = names[0] if names else f"{family.preprocessing.mean}, {family.preprocessing.std}"
    text = (
        f"{family.name} weights{place}; activation {family.activation} "
        f"({family.activation_source}), statistics {statistics} ({family.preprocessing_source})"
    )
    if "assumed" not in (family.activation_source, family.preprocessing_source):
        return text
    caution = f"; {family.caution}" if family.caution else ""
    remedy = "set activation (--init-activation) or statistics (--init-statistics) if this is wrong"
    return f"{text}{caution}; {remedy}"


# ---- configuration files beside the weights ------------------------------------------------------

CONFIGS = ("open_clip_config.json", "config.json", "preprocessor_config.json")
SECTIONS = ("vision_config", "pretrained_cfg", "preprocess_cfg", "model_cfg")
HIDDEN_ACTS = {  # transformers' names
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def _with_configs(family: Family, path: Path, width: int) -> Family:
    """Replaces what is assumed by what the files of timm, transformers and open_clip tell.

    Of transformers' networks these also give the LayerNorm epsilon and the attention heads.
    """
    if "assumed" not in (family.activation_source, family.preprocessing_source):
        return family
    for file in CONFIGS:
        config = _read_json(path.with_name(file))
        sections = [config[key] for key in SECTIONS if isinstance(config.get(key), dict)] + [config]
        if any(_width(section) not in (None, width) for section in sections):
            continue  # describes another network
        for section in sections:
            pool = section.get("global_pool")
            if pool in ("avg", "avgmax", "max", "map"):
                raise WeightsError(f"global_pool is {pool!r} in {file}: {CLS_REMEDY}")
            activation, preprocessing = _activation(section), _preprocessing(section)
            if family.name in (HF_VIT.name, HF_CLIP.name) and "layer_norm_eps" in section:
                eps, heads = section["layer_norm_eps"], section.get("num_attention_heads")
                family = family._replace(norm_eps=_checked_eps(eps, file), heads=heads)
            if activation and family.activation_source == "assumed":
                family = family._replace(activation=activation, activation_source=file)
            if preprocessing and family.preprocessing_source == "assumed":
                family = family._replace(preprocessing=preprocessing, preprocessing_source=file)
    return family


def _read_json(path: Path) -> dict:
    """{} unless `path` is a file that holds a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _width(section: dict) -> Any:
    if isinstance(section.get("vision_cfg"), dict):
        return section["vision_cfg"].get("width")
    return section.get("hidden_size", section.get("num_features"))


def _activation(section: dict) -> str | None:
    architecture = section.get("architecture")
    if isinstance(section.get("vision_cfg"), dict):  # open_clip
        return "quick_gelu" if section.get("quick_gelu") else "gelu"
    if isinstance(architecture, str) and architecture.startswith(("vit_", "deit")):  # timm
        return "quick_gelu" if "quickgelu" in architecture else "gelu"
    return HIDDEN_ACTS.get(str(section.get("hidden_act")))


def _checked_eps(eps: Any, file: str) -> float:
    if isinstance(eps, float) and 0 < eps < 1:
        return eps
    raise WeightsError(f"layer_norm_eps is {eps!r} in {file}: it must be between 0 and 1")


def _preprocessing(section: dict) -> Preprocessing | None:
    """The section's mean and std, if they are three numbers each and std is positive."""
    mean = section.get("image_mean", section.get("mean"))
    std = section.get("image_std", section.get("std"))
    for values in (mean, std):
        if not isinstance(values, (list, tuple)) or len(values) != 3:
            return None
        if not all(isinstance(value, (int, float)) and -1e6 < value < 1e6 for value in values):
            return None
    return Preprocessing(tuple(mean), tuple(std)) if min(std) > 0 else None


# ---- other layouts under timm's names ------------------------------------------------------------


_FLAX_SHAPES = (  # name, dimensions in the file, transform; kernels are (in, out) there
    (r"patch_embed.proj.weight", 4, lambda x: x.permute(3, 2, 0, 1)),  # HWIO -> OIHW
    (r".*.attn.(query|key|value).weight", 3, lambda x: x.flatten(1).T),  # (D, heads, D/heads)
    (r".*.attn.(query|key|value).bias", 2, lambda x: x.flatten()),  # (heads, D/heads)
    (r".*.attn.proj.weight", 3, lambda x: x.flatten(0, 1).T),  # (heads, D/heads, D)
    (r".*.mlp.fc[12].weight", 2, lambda x: x.T),
)


def _to_timm(weights: dict[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], int | None]:
    """The tensors under timm's names, and the number of attention heads if the shapes tell."""
    renamed, heads = {}, None
    for key, value in weights.items():
        name = key
        for pattern, replacement in layout.names:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise WeightsError(f"{key} and another array are both {name}: give one version's file")
        for pattern, dimensions, transform in _FLAX_SHAPES if "/" in layout.marks[0] else ():
            if re.fullmatch(pattern, name):
                if value.ndim != dimensions:
                    raise WeightsError(f"{key} has {value.ndim} dimensions, not {dimensions}")
                heads = value.shape[1] if name.endswith("query.weight") else heads
                value = transform(value)
        renamed[name] = value
    for query in [name for name in renamed if ".attn.query." in name]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        if all(name in renamed for name in names):  # otherwise attn.qkv is reported as missing
            parts = [renamed.pop(name) for name in names]
            if len({part.shape for part in parts}) > 1:
                raise WeightsError(f"{', '.join(names)} differ in shape: give the original file")
            renamed[query.replace("query", "qkv")] = torch.cat(parts)
    for key, dimensions in (("cls_token", 1), ("pos_embed", 2)):  # (D,), (N+1, D) in CLIP's files
        if key in renamed and renamed[key].ndim == dimensions:
            renamed[key] = renamed[key].reshape(1, -1, renamed[key].shape[-1])
    return renamed, heads


# ---- fitting the ViT -----------------------------------------------------------------------------


def fit(vit: nn.Module, weights: dict[str, Tensor], family: Family) -> list[str]:
    """Checks that `weights` fill a ViT of `family`; resizes their position table, with a note.

    Raises WeightsError for missing and unknown keys and other shapes.
    """
    shapes = {key: tuple(value.shape) for key, value in vit.state_dict().items()}
    width, heads = vit.architecture["width"], vit.architecture["heads"]
    for key in ("norm_pre.weight", "norm_pre.bias", "patch_embed.proj.bias"):
        shapes.pop(key, None)
    if family.pre_norm:
        shapes |= {"norm_pre.weight": (width,), "norm_pre.bias": (width,)}
    elif vit.architecture["stem"] == "patch":
        shapes |= {"patch_embed.proj.bias": (width,)}
    if missing := sorted(shapes.keys() - weights.keys()):
        raise WeightsError(
            f"lacks {len(missing)} keys of the backbone ({_some(missing)}): give a whole file, or "
            "choose a model of its depth and stem"
        )
    if unknown := sorted(weights.keys() - shapes.keys()):
        raise WeightsError(
            f"has {len(unknown)} keys that the backbone lacks ({_some(unknown)}): give a file of "
            "the backbone's family and depth, or use --model timm:NAME"
        )
    if family.heads not in (None, heads):
        raise WeightsError(
            f"has {family.heads} attention heads, the model {heads}: choose the file's model size"
        )
    for key, shape in shapes.items():
        actual = tuple(weights[key].shape)
        if actual != shape and not (key == "pos_embed" and actual[::2] == shape[::2]):
            raise WeightsError(
                f"{key} has shape {actual}, in the model {shape}: choose the file's model size"
            )
    rows, new_rows = weights["pos_embed"].shape[1], shapes["pos_embed"][1]
    if rows == new_rows:
        return []
    grid, new_grid = math.isqrt(max(rows - 1, 0)), math.isqrt(new_rows - 1)
    if grid < 1 or 1 + grid * grid != rows:
        raise WeightsError(
            f"pos_embed has {rows} rows, not one for the CLS token and a square grid of patches: "
            "give weights for square images"
        )
    weights["pos_embed"] = resize_position_table(weights["pos_embed"], new_grid)
    return [f"position table resized from {grid} x {grid} to {new_grid} x {new_grid}"]


def message(path: Path, error: ValueError) -> str:
    """One printable line: keys and names in a damaged file can have any characters."""
    return f"{path}: " + "".join(c if c.isprintable() else "?" for c in str(error))


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")


# ---- python pretrained.py RUN/best.pt FILE.pt ----------------------------------------------------


def main(arguments: list[str]) -> None:
    """Writes the backbone of a checkpoint in half precision; exits with status 2 on an error."""
    try:
        if len(arguments) != 2:
            raise WeightsError(f"give two files, RUN/best.pt and the one to write, not {arguments}")
        _extract(*map(Path, arguments))
    except (WeightsError, OSError, RuntimeError) as error:
        print(f"pretrained.py: {error}", file=sys.stderr)
        sys.exit(2)


def _extract(source: Path, target: Path) -> None:
    try:
        checkpoint = _read(source)
        if not checkpoint.is_own:
            raise WeightsError("this is not a checkpoint of udon.py: give a best.pt or last.pt")
        _own_family(checkpoint.content)
        weights = {key: value.half() for key, value in checkpoint.weights.items()}
        check_tensors(weights)
    except WeightsError as error:
        raise WeightsError(message(source, error)) from None
    if target.is_dir() or not target.parent.is_dir():
        raise WeightsError(f"{target} cannot be written: give a file in an existing folder")
    content = {
        "model": {f"backbone.{key}": value for key, value in weights.items()},
        "architecture": {"backbone": checkpoint.content["architecture"]["backbone"]},
        "preprocessing": checkpoint.content["preprocessing"],
    }
    partial = Path(f"{target}.partial")
    try:
        torch.save(content, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1:])
