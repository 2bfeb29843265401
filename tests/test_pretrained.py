"""pretrained.py: every family of files gives the embeddings of a ViT written in NumPy float64 from
the published equations (arXiv:2010.11929) and the file's own layout. Activation, statistics and
position table follow the family, and every assumption is noted. A file that does not fit is refused
in one sentence and leaves the ViT unchanged."""

import json
import math
import os
import pickle
import re
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import model
import pretrained

WIDTH, DEPTH, HEADS, IMAGE, PATCH = 48, 2, 3, 32, 8
GRID, HIDDEN = IMAGE // PATCH, 4 * WIDTH
STREAM = 0.02  # small values in the residual stream: LayerNorm epsilons 1e-5 and 1e-6 must differ
TOLERANCE = 2e-5  # absolute, on embeddings whose entries are about 1
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bilinear")
FAMILIES = {  # activation, LayerNorm epsilon, norm before the blocks, mean, std and interpolation
    "augreg": ("gelu_tanh", 1e-6, False, HALF),
    "augreg_variant": ("gelu_tanh", 1e-6, False, HALF),
    "timm": ("gelu", 1e-6, False, HALF),
    "timm_clip": ("gelu", 1e-5, True, CLIP),
    "clip": ("quick_gelu", 1e-5, True, CLIP),
}
CONTAINERS = [  # every form in which a family is found on disk
    ("augreg", "npz"),
    ("augreg", "npz_float64"),
    ("augreg", "npz_params"),
    ("augreg_variant", "npz"),
    ("augreg_variant", "npz_opt_target"),
    ("timm", "bare"),
    ("timm", "state_dict"),
    ("timm", "model"),
    ("timm", "module_prefix"),
    ("timm", "wrapped_module_prefix"),
    ("timm", "float16"),
    ("timm", "safetensors"),
    ("timm_clip", "bare"),
    ("timm_clip", "safetensors"),
    ("clip", "bare"),
    ("clip", "float16"),
    ("clip", "state_dict"),
    ("clip", "torchscript"),
    ("clip", "torchscript_float16"),
]
IGNORED = {  # what files of each family hold besides the backbone
    "augreg": {
        "head/kernel": (WIDTH, 10),
        "head/bias": (10,),
        "pre_logits/kernel": (WIDTH, WIDTH),
        "pre_logits/bias": (WIDTH,),
    },
    "timm": {"head.weight": (10, WIDTH), "head.bias": (10,)},
    "timm_clip": {"head.weight": (16, WIDTH), "head.bias": (16,)},
    "clip": {
        "visual.proj": (WIDTH, 16),
        "positional_embedding": (7, 24),
        "text_projection": (24, 16),
        "logit_scale": (),
        "transformer.resblocks.0.attn.in_proj_weight": (72, 24),
        "transformer.resblocks.0.ln_1.weight": (24,),
        "token_embedding.weight": (11, 24),
        "ln_final.weight": (24,),
        "input_resolution": (),
        "vocab_size": (),
    },
}
IGNORED["augreg_variant"] = IGNORED["augreg"]


# ---- random weights in the layouts of the files --------------------------------------------------


def shapes_of(family):
    """{key: (shape, role)} of a file's backbone; the role sets the scale of the random values."""
    if family == "augreg":
        return augreg_shapes()
    if family == "augreg_variant":
        return {augreg_variant_key(key): value for key, value in augreg_shapes().items()}
    return torch_shapes(family)


def augreg_shapes():
    tokens, head = 1 + GRID * GRID, WIDTH // HEADS
    shapes = {
        "cls": ((1, 1, WIDTH), "stream"),
        "Transformer/posembed_input/pos_embedding": ((1, tokens, WIDTH), "stream"),
        "embedding/kernel": ((PATCH, PATCH, 3, WIDTH), "patch"),
        "embedding/bias": ((WIDTH,), "stream"),
        "Transformer/encoder_norm/scale": ((WIDTH,), "scale"),
        "Transformer/encoder_norm/bias": ((WIDTH,), "bias"),
    }
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes[f"{block}/{norm}/scale"] = ((WIDTH,), "scale")
            shapes[f"{block}/{norm}/bias"] = ((WIDTH,), "bias")
        for part in ("query", "key", "value"):
            shapes[f"{attention}/{part}/kernel"] = ((WIDTH, HEADS, head), "kernel")
            shapes[f"{attention}/{part}/bias"] = ((HEADS, head), "bias")
        shapes |= {
            f"{attention}/out/kernel": ((HEADS, head, WIDTH), "out"),
            f"{attention}/out/bias": ((WIDTH,), "stream"),
            f"{block}/MlpBlock_3/Dense_0/kernel": ((WIDTH, HIDDEN), "kernel"),
            f"{block}/MlpBlock_3/Dense_0/bias": ((HIDDEN,), "bias"),
            f"{block}/MlpBlock_3/Dense_1/kernel": ((HIDDEN, WIDTH), "out"),
            f"{block}/MlpBlock_3/Dense_1/bias": ((WIDTH,), "stream"),
        }
    return shapes


TIMM_LAYOUT = dict(
    cls="cls_token",
    table="pos_embed",
    patch="patch_embed.proj",
    pre="norm_pre",
    norm="norm",
    block="blocks.{}.",
    norm1="norm1",
    norm2="norm2",
    qkv="attn.qkv.",
    out="attn.proj",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)
CLIP_LAYOUT = dict(
    cls="visual.class_embedding",
    table="visual.positional_embedding",
    patch="visual.conv1",
    pre="visual.ln_pre",
    norm="visual.ln_post",
    block="visual.transformer.resblocks.{}.",
    norm1="ln_1",
    norm2="ln_2",
    qkv="attn.in_proj_",
    out="attn.out_proj",
    fc1="mlp.c_fc",
    fc2="mlp.c_proj",
)


def torch_shapes(family):
    layout, tokens = CLIP_LAYOUT if family == "clip" else TIMM_LAYOUT, 1 + GRID * GRID
    batch = () if family == "clip" else (1,)
    shapes = {
        layout["cls"]: ((*batch, *batch, WIDTH), "stream"),
        layout["table"]: ((*batch, tokens, WIDTH), "stream"),
        f"{layout['patch']}.weight": ((WIDTH, 3, PATCH, PATCH), "patch"),
        f"{layout['norm']}.weight": ((WIDTH,), "scale"),
        f"{layout['norm']}.bias": ((WIDTH,), "bias"),
    }
    if family == "timm":
        shapes[f"{layout['patch']}.bias"] = ((WIDTH,), "stream")
    else:
        shapes[f"{layout['pre']}.weight"] = ((WIDTH,), "small scale")
        shapes[f"{layout['pre']}.bias"] = ((WIDTH,), "stream")
    for i in range(DEPTH):
        block = layout["block"].format(i)
        for norm in (layout["norm1"], layout["norm2"]):
            shapes[f"{block}{norm}.weight"] = ((WIDTH,), "scale")
            shapes[f"{block}{norm}.bias"] = ((WIDTH,), "bias")
        qkv, out, fc1, fc2 = (block + layout[part] for part in ("qkv", "out", "fc1", "fc2"))
        shapes |= {
            f"{qkv}weight": ((3 * WIDTH, WIDTH), "kernel"),
            f"{qkv}bias": ((3 * WIDTH,), "bias"),
            f"{out}.weight": ((WIDTH, WIDTH), "out"),
            f"{out}.bias": ((WIDTH,), "stream"),
            f"{fc1}.weight": ((HIDDEN, WIDTH), "kernel"),
            f"{fc1}.bias": ((HIDDEN,), "bias"),
            f"{fc2}.weight": ((WIDTH, HIDDEN), "out"),
            f"{fc2}.bias": ((WIDTH,), "stream"),
        }
    return shapes


def augreg_variant_key(key):
    """The name of the same array in a model that was trained further in AugReg's framework."""
    return (
        key.replace("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0")
        .replace("LayerNorm_2", "LayerNorm_1")
        .replace("MlpBlock_3", "MlpBlock_0")
    )


def random_weights(family, seed=0):
    """{key: float32 array} of the backbone, every entry random, including biases."""
    rng = np.random.default_rng(seed)
    mean_and_std = {
        "stream": (0, STREAM),
        "patch": (0, STREAM / (3 * PATCH * PATCH) ** 0.5),
        "out": (0, STREAM / WIDTH**0.5),
        "kernel": (0, 1.5 / WIDTH**0.5),
        "bias": (0, 0.3),
        "scale": (1, 0.3),
        "small scale": (STREAM, 0.3 * STREAM),
    }
    return {
        key: rng.normal(*mean_and_std[role], shape).astype(np.float32)
        for key, (shape, role) in shapes_of(family).items()
    }


def save(path, weights, container="bare"):
    """Writes {key: array} in a container, with its suffix; returns the path."""
    path = Path(path)
    if container.startswith("npz"):
        dtype = np.float64 if container == "npz_float64" else np.float32
        prefix = {"npz_params": "params/", "npz_opt_target": "opt/target/"}.get(container, "")
        arrays = {prefix + key: value.astype(dtype) for key, value in weights.items()}
        if prefix:  # what a training state holds besides
            arrays |= {"opt/state/step": np.array(3), "step": np.array(3)}
        np.savez(path.with_suffix(".npz"), **arrays)
        return path.with_suffix(".npz")
    dtype = torch.float16 if container.endswith("float16") else torch.float32
    tensors = {key: torch.from_numpy(value).to(dtype) for key, value in weights.items()}
    if container == "safetensors":
        path = path.with_suffix(".safetensors")
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
        return path
    path = path.with_suffix(".pth")
    if container.endswith("module_prefix"):
        tensors = {f"module.{key}": value for key, value in tensors.items()}
    if container.startswith("torchscript"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            torch.jit.trace(holder(tensors), torch.ones(1)).save(str(path))
    elif container in ("state_dict", "wrapped_module_prefix"):
        torch.save({"state_dict": tensors, "epoch": 3, "arch": "vit"}, path)
    elif container == "model":
        torch.save({"model": tensors, "epoch": 3}, path)
    else:
        torch.save(tensors, path)
    return path


def usual_file(folder, family, weights=None):
    """A file in the most common container of the family, by default with heads and text tower."""
    weights = whole_file(family) if weights is None else weights
    return save(folder / "weights", weights, "npz" if "augreg" in family else "bare")


def holder(tensors):
    """A module with this state dict, to be saved as a TorchScript archive."""

    class Holder(nn.Module):
        def forward(self, x):
            return x

    root = Holder()
    for key, value in tensors.items():
        *parents, leaf = key.split(".")
        module = root
        for name in parents:
            if name not in dict(module.named_children()):
                module.add_module(name, nn.Module())
            module = dict(module.named_children())[name]
        module.register_buffer(leaf, value)
    return root


def whole_file(family, seed=0):
    """The backbone's arrays and the others that such files hold."""
    rng = np.random.default_rng(seed + 1)
    return random_weights(family, seed) | {
        key: rng.normal(size=s).astype(np.float32) for key, s in IGNORED[family].items()
    }


# ---- oracle: a ViT in NumPy float64 --------------------------------------------------------------


def layer_norm(x, scale, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * scale + bias


def activate(x, activation):
    if activation == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-1.702 * x))  # quick_gelu


def equations(family, weights):
    """The file's arrays as the equations need them.

    Kernels are (in, out), or (in, heads, dim) in attention; the position table is (N+1, D).
    """
    weights = {key: value.astype(np.float64) for key, value in weights.items()}
    if family == "augreg_variant":
        weights = {key: weights[augreg_variant_key(key)] for key in augreg_shapes()}
    if "augreg" in family:
        return augreg_equations(weights)
    return torch_equations(family, weights)


def augreg_equations(w):
    def dense(name):
        return w[f"{name}/kernel"], w[f"{name}/bias"]

    def scale_and_bias(name):
        return w[f"{name}/scale"], w[f"{name}/bias"]

    def block(i):
        name = f"Transformer/encoderblock_{i}"
        attention = f"{name}/MultiHeadDotProductAttention_1"
        return dict(
            {part: dense(f"{attention}/{part}") for part in ("query", "key", "value", "out")},
            norm1=scale_and_bias(f"{name}/LayerNorm_0"),
            norm2=scale_and_bias(f"{name}/LayerNorm_2"),
            fc1=dense(f"{name}/MlpBlock_3/Dense_0"),
            fc2=dense(f"{name}/MlpBlock_3/Dense_1"),
        )

    return dict(
        patch=dense("embedding"),
        cls=w["cls"][0, 0],
        table=w["Transformer/posembed_input/pos_embedding"][0],
        pre=None,
        blocks=[block(i) for i in range(DEPTH)],
        norm=scale_and_bias("Transformer/encoder_norm"),
    )


def torch_equations(family, w):
    layout = CLIP_LAYOUT if family == "clip" else TIMM_LAYOUT

    def pair(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    def linear(name):
        return w[f"{name}.weight"].T, w[f"{name}.bias"]

    def block(i):
        name = layout["block"].format(i)
        qkv, parts = name + layout["qkv"], {}
        for number, part in enumerate(("query", "key", "value")):
            rows = slice(number * WIDTH, (number + 1) * WIDTH)
            kernel, bias = w[f"{qkv}weight"][rows].T, w[f"{qkv}bias"][rows]
            parts[part] = kernel.reshape(WIDTH, HEADS, -1), bias.reshape(HEADS, -1)
        kernel, bias = linear(name + layout["out"])
        return dict(
            parts,
            out=(kernel.reshape(HEADS, -1, WIDTH), bias),
            norm1=pair(name + layout["norm1"]),
            norm2=pair(name + layout["norm2"]),
            fc1=linear(name + layout["fc1"]),
            fc2=linear(name + layout["fc2"]),
        )

    kernel = w[f"{layout['patch']}.weight"].transpose(2, 3, 1, 0)
    return dict(
        patch=(kernel, w.get(f"{layout['patch']}.bias", 0)),
        cls=w[layout["cls"]].reshape(WIDTH),
        table=w[layout["table"]].reshape(-1, WIDTH),
        pre=None if family == "timm" else pair(layout["pre"]),
        blocks=[block(i) for i in range(DEPTH)],
        norm=pair(layout["norm"]),
    )


def oracle(family, weights, images, *, activation=None, table=None):
    """images (B, 3, H, W) -> (B, D), the CLS token after the final norm."""
    w = equations(family, weights)
    own_activation, eps, _, _ = FAMILIES[family]
    activation, table = activation or own_activation, w["table"] if table is None else table
    images = images.astype(np.float64)
    batch, _, height, width = images.shape
    patches = [
        images[:, :, y : y + PATCH, x : x + PATCH]
        for y in range(0, height, PATCH)
        for x in range(0, width, PATCH)
    ]
    x = np.stack(
        [np.einsum("bchw,hwcd->bd", patch, w["patch"][0]) + w["patch"][1] for patch in patches],
        axis=1,
    )  # (B, N, D)
    x = np.concatenate([np.broadcast_to(w["cls"], (batch, 1, WIDTH)), x], axis=1) + table
    if w["pre"]:
        x = layer_norm(x, *w["pre"], eps)
    for b in w["blocks"]:
        y = layer_norm(x, *b["norm1"], eps)
        q, k, v = (
            np.einsum("bnd,dhk->bhnk", y, b[part][0]) + b[part][1][:, None]
            for part in ("query", "key", "value")
        )
        scores = np.exp(np.einsum("bhnk,bhmk->bhnm", q, k) / math.sqrt(WIDTH / HEADS))
        mixed = np.einsum("bhnm,bhmk->bnhk", scores / scores.sum(-1, keepdims=True), v)
        x = x + np.einsum("bnhk,hkd->bnd", mixed, b["out"][0]) + b["out"][1]
        y = activate(layer_norm(x, *b["norm2"], eps) @ b["fc1"][0] + b["fc1"][1], activation)
        x = x + y @ b["fc2"][0] + b["fc2"][1]
    return layer_norm(x, *w["norm"], eps)[:, 0]


def cosines(embeddings):
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return unit @ unit.T


def largest_difference(actual, expected):
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max()


# ---- helpers -------------------------------------------------------------------------------------


def small_vit(**changes):
    sizes = dict(image_size=IMAGE, patch_size=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS)
    return model.ViT(**(sizes | changes))


def random_images(size=IMAGE, seed=0):
    return np.random.default_rng(seed + 2).normal(size=(4, 3, size, size)).astype(np.float32)


def load_with_notes(vit, path, **options):
    """Returns the preprocessing and the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        preprocessing = pretrained.load(vit, path, **options)
    return preprocessing, [str(warning.message) for warning in caught]


def embed(vit, images):
    with torch.no_grad():
        return vit(torch.from_numpy(images)).double().numpy()


def snapshot(vit):
    """Everything that loading changes."""
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    settings = [
        (module.eps if isinstance(module, nn.LayerNorm) else getattr(module, "activation", None))
        for module in vit.modules()
    ]
    return state, settings, dict(vit.architecture)


def assert_unchanged(vit, before):
    state, settings, architecture = snapshot(vit)
    assert settings == before[1] and architecture == before[2]
    assert list(state) == list(before[0])
    for key, value in state.items():
        assert torch.equal(value, before[0][key]), f"{key} changed although the file was refused"


def refused(path, vit=None, **options):
    """The message of the refusal, without the path. It is one printable line, the ViT unchanged."""
    vit = small_vit(activation="quick_gelu", norm_eps=1e-4) if vit is None else vit
    before = snapshot(vit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(pretrained.WeightsError) as caught:
            pretrained.load(vit, path, **options)
    message = str(caught.value)
    assert message.isprintable(), f"line breaks or control characters: {message!r}"
    assert str(path) in message, f"{message!r} does not name {path}"
    assert_unchanged(vit, before)
    return message.replace(str(path), "PATH")


def names(message, *keys):
    """Whether the message has one of the keys, not as a part of a longer key."""
    return any(re.search(rf"(?<![\w./]){re.escape(key)}(?![\w/]|\.\w)", message) for key in keys)


# ---- agreement with the oracle -------------------------------------------------------------------


@pytest.mark.parametrize("family, container", CONTAINERS, ids=str)
def test_embeddings_and_cosines_equal_the_oracle(tmp_path, family, container):
    weights = whole_file(family)
    path = save(tmp_path / "weights", weights, container)
    if container.endswith("float16"):
        weights = {key: value.astype(np.float16) for key, value in weights.items()}
    vit, images = small_vit(), random_images()
    load_with_notes(vit, path)
    expected, actual = oracle(family, weights, images), embed(vit, images)
    assert largest_difference(actual, expected) < TOLERANCE
    assert largest_difference(cosines(actual), cosines(expected)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_distinguishes_activations_and_epsilons(tmp_path, family):
    weights, images = random_weights(family), random_images()
    expected = oracle(family, weights, images)
    for other in {"gelu", "gelu_tanh", "quick_gelu"} - {FAMILIES[family][0]}:
        wrong = oracle(family, weights, images, activation=other)
        assert largest_difference(wrong, expected) > 2 * TOLERANCE
    vit = small_vit()
    load_with_notes(vit, usual_file(tmp_path, family, weights))
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            eps, module.eps = module.eps, 1e-6 if module.eps == 1e-5 else 1e-5
            assert largest_difference(embed(vit, images), expected) > 2 * TOLERANCE
            module.eps = eps


# ---- notes and options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, activation",
    [("clip", "gelu"), ("timm_clip", "quick_gelu"), ("timm", "gelu_tanh"), ("augreg", "gelu")],
)
def test_the_activation_can_be_set(tmp_path, family, activation):
    weights, images = random_weights(family), random_images()
    path, vit = usual_file(tmp_path, family, weights), small_vit()
    _, notes = load_with_notes(vit, path, activation=activation)
    assert len(notes) == 1 and f"activation {activation} (given)" in notes[0]
    assert vit.architecture["activation"] == activation
    expected = oracle(family, weights, images, activation=activation)
    assert largest_difference(embed(vit, images), expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["half", "imagenet", "clip"])
def test_the_statistics_can_be_set(tmp_path, family, name):
    path = usual_file(tmp_path, family)
    preprocessing, notes = load_with_notes(small_vit(), path, statistics=name)
    assert preprocessing == {"half": HALF, "imagenet": IMAGENET, "clip": CLIP}[name]
    assert len(notes) == 1 and f"statistics {name} (given)" in notes[0]


@pytest.mark.parametrize(
    "family, container, assumed",
    [
        ("augreg", "npz", False),
        ("timm", "bare", True),
        ("timm", "float16", True),
        ("timm", "model", True),  # also how MAE and DeiT are published
        ("timm_clip", "bare", True),
        ("clip", "bare", True),
        ("clip", "float16", True),  # LAION's weights may be in half precision as well
        ("clip", "torchscript_float16", False),  # OpenAI's own archive
    ],
)
def test_every_assumption_is_noted(tmp_path, family, container, assumed):
    path = save(tmp_path / "weights", whole_file(family), container)
    _, notes = load_with_notes(small_vit(), path)
    assert len(notes) == 1
    assert ("assumed" in notes[0]) == ("--init-activation" in notes[0]) == assumed, notes
    assert ("--init-statistics" in notes[0]) == assumed, notes


def test_options_leave_no_assumption(tmp_path):
    options = dict(activation="gelu", statistics="imagenet")
    _, notes = load_with_notes(small_vit(), usual_file(tmp_path, "timm"), **options)
    assert len(notes) == 1 and "assumed" not in notes[0]


@pytest.mark.parametrize("statistics", ["", "Half", "openai", "0.5"])
def test_unknown_statistics_are_refused(tmp_path, statistics):
    message = refused(usual_file(tmp_path, "timm"), statistics=statistics)
    assert repr(statistics) in message and "imagenet" in message


def test_encoders_with_imagenet_statistics_are_recognised(tmp_path):
    tensors = timm_tensors(random_weights("timm"))
    decoder = {"mask_token": torch.zeros(1, 1, 9), "decoder_embed.weight": torch.zeros(9, WIDTH)}
    prefixed = {f"module.backbone.{key}": value for key, value in tensors.items()}
    head = {"module.head.mlp.0.weight": torch.zeros(3, WIDTH)}
    for content in (
        {"model": tensors | decoder},  # MAE with its decoder
        {"student": {}, "teacher": prefixed | head, "epoch": 3},  # DINO's training checkpoint
    ):
        vit = small_vit()
        torch.save(content, tmp_path / "weights.pth")
        preprocessing, notes = load_with_notes(vit, tmp_path / "weights.pth")
        assert preprocessing == IMAGENET and "imagenet (assumed)" in notes[0]
        assert torch.equal(vit.norm.bias, tensors["norm.bias"])


# ---- configuration files beside the weights ------------------------------------------------------

TIMM_STATISTICS = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
TIMM_CONFIG = {
    "architecture": "vit_base_patch16_clip_quickgelu_224",
    "num_features": WIDTH,
    "global_pool": "token",
    "pretrained_cfg": {"mean": TIMM_STATISTICS[0], "std": TIMM_STATISTICS[1]},
}
OPEN_CLIP_CONFIG = {
    "model_cfg": {"vision_cfg": {"width": WIDTH}, "text_cfg": {"width": 24}},
    "preprocess_cfg": {"mean": list(HALF[0]), "std": list(HALF[1])},
}
HF_CONFIG = {"vision_config": {"hidden_size": WIDTH, "hidden_act": "gelu"}}
HF_PREPROCESSOR = {"image_mean": list(IMAGENET[0]), "image_std": list(IMAGENET[1])}


OLD_TIMM_CONFIG = {"architecture": "vit_s", "mean": [0.5, 0.5, 0.4], "std": [1, 1, 1]}
HF_FILES = {"config.json": HF_CONFIG, "preprocessor_config.json": HF_PREPROCESSOR}
CONFLICTING_FILES = {
    "config.json": {"hidden_act": "quick_gelu"} | HF_PREPROCESSOR,
    "open_clip_config.json": OPEN_CLIP_CONFIG,
}
JAX_CONFIG = {"hidden_act": "gelu_pytorch_tanh"}


@pytest.mark.parametrize(
    "family, files, activation, statistics",
    [
        ("timm_clip", {"config.json": TIMM_CONFIG}, "quick_gelu", TIMM_STATISTICS),
        (
            "timm",
            {"config.json": OLD_TIMM_CONFIG},
            "gelu",
            ((0.5, 0.5, 0.4), (1, 1, 1), "bilinear"),
        ),
        ("timm", {"preprocessor_config.json": HF_PREPROCESSOR}, "gelu", IMAGENET),
        ("timm", {"config.json": JAX_CONFIG}, "gelu_tanh", HALF),
        ("clip", {"open_clip_config.json": OPEN_CLIP_CONFIG}, "gelu", HALF),
        ("clip", {"config.json": HF_CONFIG}, "gelu", CLIP),
        ("clip", HF_FILES, "gelu", IMAGENET),
        ("clip", CONFLICTING_FILES, "gelu", HALF),  # open_clip's file is read first
        ("augreg", {"config.json": TIMM_CONFIG}, "gelu_tanh", HALF),  # nothing is assumed
    ],
)
def test_configuration_files_replace_assumptions(tmp_path, family, files, activation, statistics):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    vit = small_vit()
    preprocessing, notes = load_with_notes(vit, usual_file(tmp_path, family))
    assert vit.architecture["activation"] == activation and preprocessing == statistics
    assert len(notes) == 1 and (family == "augreg" or any(name in notes[0] for name in files))


def test_options_override_configuration_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG))
    options, vit = dict(activation="gelu", statistics="clip"), small_vit()
    preprocessing, notes = load_with_notes(vit, usual_file(tmp_path, "timm_clip"), **options)
    assert vit.architecture["activation"] == "gelu" and preprocessing == CLIP
    assert "config.json" not in notes[0]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(TIMM_CONFIG | {"num_features": 2 * WIDTH}),  # of another network
        json.dumps(HF_CONFIG | {"vision_config": {"hidden_size": 7, "hidden_act": "quick_gelu"}}),
        json.dumps({"mean": [0.5, 0.5], "std": [1, 1, 1], "hidden_act": "swish"}),
        json.dumps({"mean": [math.nan, 0, 0], "std": [1, 1, 1], "hidden_act": ["gelu"]}),
        json.dumps({"mean": [0, 0, 0], "std": [0, 1, 1], "architecture": "resnet50"}),
        json.dumps({"mean": [0, 0, 10**400], "std": [1, 1, 1]}),
        json.dumps({"image_mean": "0.5", "image_std": None, "pretrained_cfg": []}),
        json.dumps([1, 2]),
        "{",
        "",
        "[" * 100_000,
    ],
)
def test_other_configuration_files_are_ignored(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    vit = small_vit()
    preprocessing, notes = load_with_notes(vit, usual_file(tmp_path, "timm"))
    assert vit.architecture["activation"] == "gelu" and preprocessing == HALF
    assert len(notes) == 1 and "half (assumed)" in notes[0]


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_pooling_in_a_configuration_file_is_refused(tmp_path, pool):
    (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG | {"global_pool": pool}))
    message = refused(usual_file(tmp_path, "timm_clip"))
    assert repr(pool) in message and "config.json" in message


# ---- wrappers and prefixes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrappers, prefix",
    [
        (("state_dict",), "module."),
        (("model",), "_orig_mod."),
        (("model_ema",), "module."),
        (("state_dict_ema",), ""),
        (("teacher",), "module.backbone."),
        (("teacher",), "backbone."),
        (("model", "state_dict"), "model."),
        (("state_dict",), "module._orig_mod.model."),
    ],
    ids=str,
)
def test_wrappers_and_prefixes_are_removed(tmp_path, wrappers, prefix):
    tensors, vit = timm_tensors(random_weights("timm")), small_vit()
    content = {f"{prefix}{key}": value for key, value in tensors.items()}
    for name in reversed(wrappers):
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / "weights.pth")
    _, notes = load_with_notes(vit, tmp_path / "weights.pth")
    assert all(torch.equal(value, tensors[key]) for key, value in vit.state_dict().items())
    assert ".".join(wrappers) in notes[0]


@pytest.mark.parametrize(
    "averaged, raw", [("state_dict_ema", "state_dict"), ("model_ema", "model")]
)
@pytest.mark.parametrize("averaged_first", [True, False])
def test_averaged_weights_come_before_raw_ones(tmp_path, averaged, raw, averaged_first):
    expected, other = (timm_tensors(random_weights("timm", seed)) for seed in (0, 1))
    content = {averaged: expected, raw: other}
    if not averaged_first:
        content = dict(reversed(content.items()))
    torch.save(content, tmp_path / "weights.pth")
    vit = small_vit()
    _, notes = load_with_notes(vit, tmp_path / "weights.pth")
    assert torch.equal(vit.norm.bias, expected["norm.bias"]) and averaged in notes[0]


def test_an_empty_average_is_skipped(tmp_path):
    tensors, vit = timm_tensors(random_weights("timm")), small_vit()
    torch.save({"state_dict_ema": None, "state_dict": tensors}, tmp_path / "weights.pth")
    load_with_notes(vit, tmp_path / "weights.pth")
    assert torch.equal(vit.norm.bias, tensors["norm.bias"])


def test_a_dict_within_itself_is_refused(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth")


# ---- settings of a family ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [dict(activation="gelu", norm_eps=1e-3), dict(activation="quick_gelu", pre_norm=True)],
    ids=["plain", "pre_norm"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_the_family_replace_those_of_the_vit(tmp_path, family, start):
    activation, eps, pre_norm, statistics = FAMILIES[family]
    vit, images = small_vit(**start), random_images()
    preprocessing, _ = load_with_notes(vit, usual_file(tmp_path, family))
    assert preprocessing == statistics
    settings = dict(activation=activation, norm_eps=eps, pre_norm=pre_norm)
    assert settings.items() <= vit.architecture.items()
    expected = oracle(family, random_weights(family), images)
    assert largest_difference(embed(vit, images), expected) < TOLERANCE
    rebuilt = model.ViT(**vit.architecture)
    rebuilt.load_state_dict(vit.state_dict())
    assert np.array_equal(embed(rebuilt, images), embed(vit, images))


def test_a_vit_can_be_filled_from_family_after_family(tmp_path):
    vit, images = small_vit(), random_images()
    for turn, family in enumerate(("clip", "augreg", "timm_clip", "timm", "clip")):
        weights = random_weights(family, seed=turn)
        (tmp_path / str(turn)).mkdir()
        load_with_notes(vit, usual_file(tmp_path / str(turn), family, weights))
        expected = oracle(family, weights, images)
        assert largest_difference(embed(vit, images), expected) < TOLERANCE, family
    assert all(parameter.requires_grad for parameter in vit.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vit_keeps_its_dtype(tmp_path, family):
    vit, images = small_vit().double(), random_images().astype(np.float64)
    load_with_notes(vit, usual_file(tmp_path, family))
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float64}
    expected = oracle(family, random_weights(family), images)
    assert largest_difference(embed(vit, images), expected) < 1e-9


def test_the_path_may_be_a_string(tmp_path):
    for path in (
        save(tmp_path / "a", random_weights("timm")),
        save(tmp_path / "b", random_weights("augreg"), "npz"),
        save(tmp_path / "c", random_weights("clip"), "torchscript_float16"),
    ):
        first, second = small_vit(), small_vit()
        load_with_notes(first, str(path))
        load_with_notes(second, path)
        assert_unchanged(first, snapshot(second))


# ---- position table ------------------------------------------------------------------------------


def resized_by_torch(table, grid):
    """(1 + n*n, D) -> (1 + grid*grid, D), column by column of the table."""
    n = math.isqrt(len(table) - 1)
    planes = torch.from_numpy(table[1:].T.astype(np.float32).reshape(-1, 1, 1, n, n))
    options = dict(size=(grid, grid), mode="bicubic", antialias=True)
    resized = [F.interpolate(plane, **options).numpy().ravel() for plane in planes]
    return np.concatenate([table[:1], np.stack(resized, axis=1)])


@pytest.mark.parametrize("image", [16, 24, 48, 56])
@pytest.mark.parametrize("family", ["augreg", "timm", "clip"])
def test_a_table_for_another_grid_is_resized_with_a_note(tmp_path, family, image):
    weights, images = random_weights(family), random_images(image)
    vit, table = small_vit(image_size=image), equations(family, weights)["table"]
    _, notes = load_with_notes(vit, usual_file(tmp_path, family, weights))
    expected, actual = resized_by_torch(table, image // PATCH), vit.pos_embed[0].detach().numpy()
    assert np.array_equal(actual[0], table[0].astype(np.float32)), "the CLS row has changed"
    assert largest_difference(actual, expected) < 1e-7
    embeddings = oracle(family, weights, images, table=expected)
    assert largest_difference(embed(vit, images), embeddings) < TOLERANCE
    (note,) = (note for note in notes if "position" in note)
    assert f"{GRID} x {GRID}" in note and f"{image // PATCH} x {image // PATCH}" in note


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_for_the_same_grid_is_kept_without_a_note(tmp_path, family):
    weights, vit = random_weights(family), small_vit()
    _, notes = load_with_notes(vit, usual_file(tmp_path, family, weights))
    expected = equations(family, weights)["table"].astype(np.float32)
    assert np.array_equal(vit.pos_embed[0].detach().numpy(), expected)
    assert not [note for note in notes if "position" in note]


@pytest.mark.parametrize("image", [16, 48])
def test_a_constant_table_stays_constant(tmp_path, image):
    weights = random_weights("timm")
    weights["pos_embed"][:, 1:] = weights["pos_embed"][:, 1:2]
    vit = small_vit(image_size=image)
    load_with_notes(vit, save(tmp_path / "weights", weights))
    table = vit.pos_embed[0].detach().numpy()
    assert np.array_equal(table[0], weights["pos_embed"][0, 0])
    assert np.abs(table[1:] - weights["pos_embed"][0, 1]).max() < 1e-7


@settings(max_examples=40)
@given(n=st.integers(1, 9), grid=st.integers(1, 9), seed=st.integers(0, 99))
def test_resizing_is_linear_and_commutes_with_transposition(n, grid, seed):
    rng = np.random.default_rng(seed)
    first = torch.from_numpy(rng.normal(size=(1, 1 + n * n, 5)).astype(np.float32))
    second = torch.from_numpy(rng.normal(size=(1, 1 + n * n, 5)).astype(np.float32))
    resize = pretrained.resize_position_table

    def transposed(table):
        side = math.isqrt(table.shape[1] - 1)
        patches = table[:, 1:].reshape(1, side, side, -1).transpose(1, 2).flatten(1, 2)
        return torch.cat([table[:, :1], patches], dim=1)

    resized = resize(first, grid)
    assert resized.shape == (1, 1 + grid * grid, 5)
    assert torch.allclose(resize(transposed(first), grid), transposed(resized), atol=1e-5)
    combined = 2 * resized - resize(second, grid)
    assert torch.allclose(resize(2 * first - second, grid), combined, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 7, 13, 16])  # 13: a grid of 3 x 4
def test_a_table_that_is_not_square_is_refused(tmp_path, rows):
    weights = random_weights("timm")
    weights["pos_embed"] = weights["pos_embed"][:, :rows]
    assert f"{rows} rows" in refused(save(tmp_path / "weights", weights))


# ---- missing and unknown keys --------------------------------------------------------------------

TIMM_NAMES = {
    "augreg": [
        ("Transformer/posembed_input/pos_embedding", "pos_embed"),
        ("Transformer/encoderblock_", "blocks."),
        ("cls", "cls_token"),
        ("Transformer/encoder_norm", "norm"),
        ("embedding/", "patch_embed.proj/"),
        ("LayerNorm_0", "norm1"),
        ("LayerNorm_2", "norm2"),
        ("MultiHeadDotProductAttention_1/out", "attn.proj"),
        ("MultiHeadDotProductAttention_1", "attn"),
        ("query", "qkv"),
        ("key", "qkv"),
        ("value", "qkv"),
        ("MlpBlock_3/Dense_0", "mlp.fc1"),
        ("MlpBlock_3/Dense_1", "mlp.fc2"),
        ("kernel", "weight"),
        ("scale", "weight"),
        ("/", "."),
    ],
    "clip": [
        ("visual.class_embedding", "cls_token"),
        ("visual.positional_embedding", "pos_embed"),
        ("visual.conv1", "patch_embed.proj"),
        ("visual.ln_pre", "norm_pre"),
        ("visual.ln_post", "norm"),
        ("visual.transformer.resblocks", "blocks"),
        ("ln_1", "norm1"),
        ("ln_2", "norm2"),
        ("in_proj_", "qkv."),
        ("out_proj", "proj"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ],
    "timm": [],
    "timm_clip": [],
}
KEYS = [
    (family, key)
    for family in TIMM_NAMES
    for key in shapes_of(family)
    if not re.search("encoderblock_0|blocks.0", key)
]
UNKNOWN = {
    "augreg": [
        "register",
        "Transformer/extra",
        "Transformer/encoderblock_1/LayerNorm_3/scale",
        "Transformer/encoderblock_1/gate/kernel",
        "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/gate/bias",
        "Transformer/encoderblock_1/MlpBlock_3/Dense_2/bias",
        "MAPHead_0/probe",
    ],
    "timm": [
        "blocks.1.ls1.gamma",
        "reg_token",
        "dist_token",
        "blocks.1.attn.q_norm.weight",
        "fc_norm.weight",
        "attn_pool.latent",
        "patch_embed.norm.weight",
    ],
    "timm_clip": ["patch_embed.proj.bias", "blocks.0.ls1.gamma"],
    "clip": [
        "visual.attn_pool.query",
        "visual.transformer.resblocks.1.ls_1.gamma",
        "visual.conv1.bias",
    ],
}


def timm_name(family, key):
    """timm's name of a file's key; a message may have either."""
    for old, new in TIMM_NAMES[family]:
        key = key.replace(old, new)
    return key


@pytest.mark.parametrize("family, key", KEYS, ids=str)
def test_a_missing_key_is_named(tmp_path, family, key):
    weights = whole_file(family)
    del weights[key]
    message = refused(usual_file(tmp_path, family, weights))
    assert names(message, key, timm_name(family, key)), message


@pytest.mark.parametrize(
    "family, key", [(family, key) for family, keys in UNKNOWN.items() for key in keys], ids=str
)
def test_an_unknown_key_is_named(tmp_path, family, key):
    weights = whole_file(family) | {key: np.ones(WIDTH, np.float32)}
    message = refused(usual_file(tmp_path, family, weights))
    assert names(message, key, key.removeprefix("visual."), timm_name(family, key)), message


@pytest.mark.parametrize(
    "key",
    [
        "LayerNorm_2/bias",
        "MlpBlock_3/Dense_0/bias",
        "MultiHeadDotProductAttention_1/out/bias",
        "MultiHeadDotProductAttention_1/query/bias",
    ],
)
def test_two_versions_of_an_augreg_array_are_refused(tmp_path, key):
    weights = whole_file("augreg")
    key = f"Transformer/encoderblock_1/{key}"
    weights[augreg_variant_key(key)] = weights[key] + 1
    message = refused(save(tmp_path / "weights", weights, "npz"))
    assert names(message, key, augreg_variant_key(key)), message


@pytest.mark.parametrize(
    "family, prefix",
    [
        ("augreg", "cls"),
        ("timm", "cls_token"),
        ("clip", "visual.class_embedding"),
        ("clip", "visual.ln_pre"),
    ],
)
def test_networks_that_pool_their_patches_are_refused(tmp_path, family, prefix):
    weights = whole_file(family)
    weights = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    message = refused(usual_file(tmp_path, family, weights))
    assert prefix in message and "reads the CLS token" in message


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(width=96), ["48", "96"]),
        (dict(mlp_ratio=2.0), ["192", "96"]),
        (dict(depth=1), ["blocks.1."]),
        (dict(depth=3), ["blocks.2."]),
        (dict(patch_size=16), ["8, 8", "16, 16"]),
        (dict(patch_size=4), ["8, 8", "4, 4"]),
        (dict(patch_size=16, image_size=64), ["8, 8", "16, 16"]),
        (dict(stem="conv"), ["patch_embed.proj."]),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["augreg", "timm", "clip"])
def test_another_size_is_refused(tmp_path, family, change, words):
    message = refused(usual_file(tmp_path, family), small_vit(**change))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("family", ["augreg", "augreg_variant"])
def test_another_number_of_heads_is_refused(tmp_path, family):
    message = refused(usual_file(tmp_path, family), small_vit(heads=6))
    assert names(message, "3") and names(message, "6"), message


@pytest.mark.parametrize(
    "family, key",
    [
        ("augreg", "cls"),
        ("augreg", "embedding/kernel"),
        ("augreg", "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"),
        ("augreg", "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/bias"),
        ("augreg", "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"),
        ("augreg", "Transformer/posembed_input/pos_embedding"),
        ("timm", "cls_token"),
        ("timm", "pos_embed"),
        ("timm", "norm.weight"),
        ("clip", "visual.positional_embedding"),
        ("clip", "visual.class_embedding"),
        ("clip", "visual.conv1.weight"),
    ],
    ids=str,
)
def test_another_number_of_dimensions_is_refused(tmp_path, family, key):
    weights = whole_file(family)
    for value in (weights[key].ravel()[:-1], np.float32(1)):
        refused(usual_file(tmp_path, family, weights | {key: np.asarray(value)}))


def test_an_unknown_activation_is_refused(tmp_path):
    message = refused(usual_file(tmp_path, "clip"), activation="relu")
    assert "'relu'" in message and "gelu_tanh" in message


# ---- tensors -------------------------------------------------------------------------------------


def without_values(value):
    """A tensor that claims 10**15 values and holds one."""
    return torch.ones(1).expand(10**5, 10**5, 10**5)


BAD_TENSORS = {
    "NaN": lambda value: value.index_fill(0, torch.tensor([0]), math.nan),
    "infinite": lambda value: value.index_fill(0, torch.tensor([0]), -math.inf),
    "infinite in float32": lambda value: value.double().fill_(1e300),
    "integer": lambda value: value.long(),
    "boolean": lambda value: value.bool(),
    "complex": lambda value: value.to(torch.complex64),
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "sparse": lambda value: value.to_sparse(),
    "meta": lambda value: value.to("meta"),
    "quantised": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "without values": without_values,
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
@pytest.mark.parametrize("key", ["norm.bias", "blocks.1.attn.qkv.weight", "pos_embed"])
def test_unusable_tensors_are_refused_by_key(tmp_path, key, kind):
    tensors = timm_tensors(random_weights("timm"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated
        torch.save(tensors | {key: BAD_TENSORS[kind](tensors[key])}, tmp_path / "weights.pth")
    assert names(refused(tmp_path / "weights.pth"), key)


@pytest.mark.parametrize("kind", ["NaN", "without values", "sparse"])
@pytest.mark.parametrize("family", ["augreg", "clip"])
def test_unusable_tensors_of_other_layouts_are_refused_by_key(tmp_path, family, kind):
    key = {
        "augreg": "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel",
        "clip": "visual.transformer.resblocks.1.attn.in_proj_weight",
    }[family]
    tensors = timm_tensors(random_weights(family))
    torch.save(tensors | {key: BAD_TENSORS[kind](tensors[key])}, tmp_path / "weights.pth")
    assert names(refused(tmp_path / "weights.pth"), key)


def test_unusable_tensors_outside_the_backbone_are_ignored(tmp_path):
    tensors = timm_tensors(random_weights("timm"))
    torch.save(tensors | {"head.weight": torch.tensor(math.nan)}, tmp_path / "weights.pth")
    load_with_notes(small_vit(), tmp_path / "weights.pth")


# ---- files of other kinds ------------------------------------------------------------------------


class Bomb:
    """Its pickle would create the file `target` when loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def bad_contents(folder):
    """{kind: content for torch.save}"""
    tensors, bomb = timm_tensors(random_weights("timm")), Bomb(folder / "exploded")
    return {
        "saved object": {"state_dict": tensors, "config": bomb},
        "saved module": small_vit(),
        "tensor": torch.ones(3),
        "list": [torch.ones(3)],
        "number": 3,
        "keys with control characters": {f"\x1b[2J\n{key}": v for key, v in tensors.items()},
        "no keys": {},
        "no tensors": {"state_dict": {"epoch": 3}},
        "keys that are numbers": {0: torch.ones(3), 1: torch.ones(3)},
        "another network": {
            "conv1.weight": torch.ones(8, 3, 7, 7),
            "layer1.0.conv1.weight": torch.ones(8, 8, 3, 3),
        },
        "CLIP's ResNet": {
            "visual.conv1.weight": torch.ones(4, 3, 3, 3),
            "visual.attnpool.positional_embedding": torch.ones(50, 8),
            "visual.layer1.0.conv1.weight": torch.ones(4, 4, 1, 1),
            "positional_embedding": torch.ones(7, 8),
        },
        "CLIP's text tower": {
            "positional_embedding": torch.ones(7, 8),
            "ln_final.weight": torch.ones(8),
        },
        "open_clip around timm, pooled": {"visual.trunk.attn_pool.latent": torch.ones(1, 1, 8)}
        | {f"visual.trunk.{key}": v for key, v in tensors.items()},
        "flat teacher": {f"teacher.backbone.{key}": v for key, v in tensors.items()},
    }


def bad_files(folder):
    """{kind: function that writes such a file and returns its path}"""
    timm, augreg = random_weights("timm"), random_weights("augreg")
    png, text = b"\x89PNG\r\n\x1a\n" + bytes(200), b"line one\nline two\n"

    def raw(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    def saved(kind):
        torch.save(bad_contents(folder)[kind], folder / "weights.pth")
        return folder / "weights.pth"

    def cut(path, share):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        return path

    def cut_torchscript():
        return cut(save(folder / "a", random_weights("clip"), "torchscript"), 0.5)

    def npz(**arrays):
        np.savez(folder / "weights.npz", **arrays)
        return folder / "weights.npz"

    def one_array():
        np.save(folder / "array.npy", augreg["cls"])
        return (folder / "array.npy").rename(folder / "array.npz")

    bomb = Bomb(folder / "exploded")
    files = {kind: lambda kind=kind: saved(kind) for kind in bad_contents(folder)}
    files |= {
        "pickled object": lambda: raw("weights.pth", pickle.dumps({"state_dict": bomb})),
        "torchscript cut": cut_torchscript,
        "npz named pth": lambda: save(folder / "a", augreg, "npz").rename(folder / "a.pth"),
        "pth named npz": lambda: save(folder / "a", timm).rename(folder / "a.npz"),
        "npz of objects": lambda: npz(cls=np.array([bomb, None], dtype=object)),
        "npz of strings": lambda: npz(cls=np.array(["a", "b"])),
        "npz of nothing": lambda: npz(),
        "one array": one_array,
    }
    for suffix in (".pth", ".npz", ".txt"):
        files[f"missing{suffix}"] = lambda suffix=suffix: folder / f"none{suffix}"
        files[f"image{suffix}"] = lambda suffix=suffix: raw(f"image{suffix}", png)
        files[f"text{suffix}"] = lambda suffix=suffix: raw(f"text{suffix}", text)
    for share in (0.02, 0.5, 0.99):
        files[f"npz cut at {share}"] = lambda s=share: cut(save(folder / "a", augreg, "npz"), s)
        files[f"pth cut at {share}"] = lambda s=share: cut(save(folder / "a", timm), s)
    return files


def timm_tensors(weights):
    return {key: torch.from_numpy(value) for key, value in weights.items()}


@pytest.mark.parametrize("kind", sorted(bad_files(Path())))
def test_a_file_of_another_kind_is_refused(tmp_path, kind):
    refused(bad_files(tmp_path)[kind]())
    assert not (tmp_path / "exploded").exists(), "a pickled object was loaded"


@pytest.mark.parametrize("container", ["bare", "float16", "torchscript", "npz"])
def test_a_flipped_bit_is_found(tmp_path, container):
    family = "augreg" if container == "npz" else "clip"
    path = save(tmp_path / "weights", random_weights(family), container)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # the lowest bit of some weight
    path.write_bytes(content)
    assert "checksum" in refused(path)


RECOGNISED = {  # content, word in the message
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
    "web page": (b"<!DOCTYPE html>\n<html><head><title>404</title>", "web page"),
    "web page with blanks": (b"\xef\xbb\xbf\n  <html lang=en>", "web page"),
    "msgpack": (b"\x82\xa6params\x81\xa3vit\x80", "msgpack"),
    "large msgpack": (b"\xde\x00\x20\xa6params\x81", "msgpack"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "empty": (b"", "empty"),
}


@pytest.mark.parametrize("kind", RECOGNISED)
@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors", ".msgpack"])
def test_other_formats_are_named(tmp_path, kind, suffix):
    content, word = RECOGNISED[kind]
    (tmp_path / f"file{suffix}").write_bytes(content)
    message = refused(tmp_path / f"file{suffix}")
    assert word in message or (suffix == ".msgpack" and "msgpack" in message)


@pytest.mark.parametrize("suffix", ["", ".pth", ".npz"])
def test_a_folder_and_a_pipe_are_named(tmp_path, suffix):
    (tmp_path / f"folder{suffix}").mkdir()
    os.mkfifo(tmp_path / f"pipe{suffix}")
    assert "folder has no weights" in refused(tmp_path / f"folder{suffix}")
    assert "no regular file" in refused(tmp_path / f"pipe{suffix}")


@pytest.mark.parametrize(
    "content", [b"no safetensors\n", struct.pack("<Q", 1 << 40) + b"{}"], ids=["text", "header"]
)
def test_a_bad_safetensors_file_is_refused(tmp_path, content):
    pytest.importorskip("safetensors")
    (tmp_path / "weights.safetensors").write_bytes(content)
    refused(tmp_path / "weights.safetensors")


def test_a_missing_safetensors_package_is_named(tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    (tmp_path / "weights.safetensors").write_bytes(b"{}")
    assert "pip install -e '.[interop]'" in refused(tmp_path / "weights.safetensors")


def test_a_tensor_named_like_a_wrapper_is_an_unknown_key(tmp_path):
    tensors = timm_tensors(random_weights("timm")) | {"state_dict": torch.ones(1)}
    torch.save(tensors, tmp_path / "weights.pth")
    assert names(refused(tmp_path / "weights.pth"), "state_dict")


# ---- checkpoints and weights of this project -----------------------------------------------------


def own_vit(**changes):
    sizes = dict(image_size=32, patch_size=8, width=24, depth=2, heads=2, stem="conv")
    return model.ViT(**(sizes | changes))


def own_checkpoint(path, vit, **changes):
    weights = {f"backbone.{key}": value for key, value in vit.state_dict().items()}
    content = {
        "version": 1,
        "model": weights | {"student_head.weight": torch.zeros(2, 2)},
        "architecture": {"backbone": vit.architecture, "classes": {"a": 2}},
        "preprocessing": {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "antialias": True},
    }
    torch.save(content | changes, path)
    return path


def test_own_checkpoints_carry_their_family_and_statistics(tmp_path):
    torch.manual_seed(0)
    source = own_vit(activation="quick_gelu", norm_eps=1e-4)
    target = own_vit(activation="gelu", norm_eps=1e-6)
    path = own_checkpoint(tmp_path / "best.pt", source)
    (tmp_path / "config.json").write_text(json.dumps(OLD_TIMM_CONFIG))  # the run's own, not read
    preprocessing, notes = load_with_notes(target, path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(target(images), source(images)), "weights, activation or epsilon differ"
    assert preprocessing == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear") and notes == []


def test_options_override_own_checkpoints(tmp_path):
    vit, options = own_vit(), dict(activation="gelu", statistics="clip")
    path = own_checkpoint(tmp_path / "best.pt", own_vit())
    assert load_with_notes(vit, path, **options)[0] == CLIP
    assert vit.architecture["activation"] == "gelu"


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(heads=3), "attention heads"),
        (dict(depth=3), "blocks.2."),
        (dict(depth=1), "blocks.1."),
        (dict(stem="patch"), "patch_embed.proj"),
    ],
)
def test_own_checkpoints_of_other_sizes_are_refused(tmp_path, changes, word):
    path = own_checkpoint(tmp_path / "best.pt", own_vit())
    assert word in refused(path, own_vit(**changes))


BACKBONE = own_vit().architecture


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": {}},
        {"architecture": None},
        {"architecture": {"backbone": [1]}},
        {"architecture": {"backbone": BACKBONE | {"activation": "relu"}}},
        {"architecture": {"backbone": BACKBONE | {"activation": ["gelu"]}}},
        {"architecture": {"backbone": BACKBONE | {"norm_eps": "1e-6"}}},
        {"architecture": {"backbone": BACKBONE | {"norm_eps": math.nan}}},
        {"architecture": {"backbone": BACKBONE | {"pre_norm": "yes"}}},
        {"architecture": {"backbone": BACKBONE | {"pre_norm": True}}},
        {"architecture": {"backbone": BACKBONE | {"heads": 10**9}}},
        {"preprocessing": None},
        {"preprocessing": {"mean": (0.5, 0.5, 0.5)}},
        {"preprocessing": {"mean": (0.5, 0.5), "std": (0.5, 0.5, 0.5)}},
        {"preprocessing": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.0, 0.5)}},
        {"preprocessing": {"mean": (0.5, 0.5, math.nan), "std": (0.5, 0.5, 0.5)}},
        {"preprocessing": {"mean": "0.5", "std": ("a", "b", "c")}},
    ],
    ids=str,
)
def test_own_checkpoints_with_invalid_metadata_are_refused(tmp_path, changes):
    refused(own_checkpoint(tmp_path / "best.pt", own_vit(), **changes), own_vit())


def test_the_backbone_of_a_checkpoint_can_be_extracted(tmp_path):
    """python pretrained.py RUN/best.pt FILE.pt"""
    torch.manual_seed(0)
    source, target, path = own_vit(), own_vit(), tmp_path / "compact.pt"
    pretrained.main([str(own_checkpoint(tmp_path / "best.pt", source)), str(path)])
    weights = torch.load(path, weights_only=True)["model"]
    assert all(key.startswith("backbone.") for key in weights)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert load_with_notes(target, path) == (((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear"), [])
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key].half().float()), key


def test_failed_extractions_name_the_file_and_write_nothing(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("no checkpoint")
    good = own_checkpoint(tmp_path / "best.pt", own_vit())
    large = own_vit()
    with torch.no_grad():
        large.norm.bias.fill_(1e6)  # infinite in half precision
    overflowing = own_checkpoint(tmp_path / "large.pt", large)
    public = save(tmp_path / "public", random_weights("timm"))
    before = sorted(tmp_path.rglob("*"))
    for arguments, word in (
        (["none.pt", tmp_path / "other.pt"], "none.pt"),
        ([tmp_path / "text.pt", tmp_path / "other.pt"], "text.pt"),
        ([public, tmp_path / "other.pt"], "public.pth"),
        ([overflowing, tmp_path / "other.pt"], "norm.bias"),
        ([good, tmp_path / "missing" / "other.pt"], "other.pt"),
        ([good, tmp_path], str(tmp_path)),
        ([good], "best.pt"),
        ([], "RUN/best.pt"),
    ):
        with pytest.raises(SystemExit) as stop:
            pretrained.main([str(argument) for argument in arguments])
        assert stop.value.code == 2 and word in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["micro", "mini"])
def test_the_compact_weights_load_without_a_note(name):
    path, vit = pretrained.COMPACT[name], model.ViT(**model.SIZES[name])
    assert load_with_notes(vit, path) == (HALF, [])
    assert path.stat().st_size <= 4_000_000
    assert all(value.isfinite().all() for value in vit.state_dict().values())
