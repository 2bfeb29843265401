"""Tests of pretrained.py: every family of files gives the embeddings of a ViT written in numpy float64 from the published equations
(arXiv:2010.11929) on the file's own layout; settings, statistics and the position table follow the family; what cannot fill the
backbone is refused in one sentence and leaves the ViT bit-identical."""

import ast
import math
import pickle
import re
import struct
import subprocess
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
STREAM = 0.02  # size of all that enters the residual stream, so that LayerNorm epsilons 1e-5 and 1e-6 differ visibly
TOLERANCE = 2e-5  # absolute, on embeddings whose entries are about 1
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
FAMILIES = {  # what comes with the weights: activation, LayerNorm epsilon, norm before the blocks, (mean, std)
    "augreg": ("gelu_tanh", 1e-6, False, HALF),
    "augreg_variant": ("gelu_tanh", 1e-6, False, HALF),
    "timm": ("gelu", 1e-6, False, HALF),
    "timm_clip": ("gelu", 1e-5, True, CLIP),
    "clip": ("quick_gelu", 1e-5, True, CLIP),
}
CONTAINERS = [  # every way a family is found on disk
    ("augreg", "npz"),
    ("augreg", "npz_float64"),
    ("augreg_variant", "npz"),
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
IGNORED = {  # what files of each family hold beside the backbone
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


# ---- weights in the layouts of the files ---------------------------------------------------------


def shapes_of(family):
    """{key: (shape, role)} of a file's backbone; the role says how large random values must be for every part to matter."""
    tokens, head = 1 + GRID * GRID, WIDTH // HEADS
    if family == "augreg":
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
            for norm in ("LayerNorm_0", "LayerNorm_2"):
                shapes |= {
                    f"{block}/{norm}/scale": ((WIDTH,), "scale"),
                    f"{block}/{norm}/bias": ((WIDTH,), "bias"),
                }
            attention = f"{block}/MultiHeadDotProductAttention_1"
            for part in ("query", "key", "value"):
                shapes |= {
                    f"{attention}/{part}/kernel": ((WIDTH, HEADS, head), "kernel"),
                    f"{attention}/{part}/bias": ((HEADS, head), "bias"),
                }
            shapes |= {
                f"{attention}/out/kernel": ((HEADS, head, WIDTH), "out"),
                f"{attention}/out/bias": ((WIDTH,), "stream"),
                f"{block}/MlpBlock_3/Dense_0/kernel": ((WIDTH, HIDDEN), "kernel"),
                f"{block}/MlpBlock_3/Dense_0/bias": ((HIDDEN,), "bias"),
                f"{block}/MlpBlock_3/Dense_1/kernel": ((HIDDEN, WIDTH), "out"),
                f"{block}/MlpBlock_3/Dense_1/bias": ((WIDTH,), "stream"),
            }
        return shapes
    if family == "augreg_variant":
        return {augreg_variant_key(key): value for key, value in shapes_of("augreg").items()}
    if family == "clip":
        names = dict(
            patch="visual.conv1",
            norm="visual.ln_post",
            pre="visual.ln_pre",
            block="visual.transformer.resblocks",
            norm1="ln_1",
            norm2="ln_2",
            qkv="attn.in_proj_",
            out="attn.out_proj",
            fc1="mlp.c_fc",
            fc2="mlp.c_proj",
        )
        shapes = {
            "visual.class_embedding": ((WIDTH,), "stream"),
            "visual.positional_embedding": ((tokens, WIDTH), "stream"),
        }
    else:
        names = dict(
            patch="patch_embed.proj",
            norm="norm",
            pre="norm_pre",
            block="blocks",
            norm1="norm1",
            norm2="norm2",
            qkv="attn.qkv.",
            out="attn.proj",
            fc1="mlp.fc1",
            fc2="mlp.fc2",
        )
        shapes = {
            "cls_token": ((1, 1, WIDTH), "stream"),
            "pos_embed": ((1, tokens, WIDTH), "stream"),
        }
    shapes[f"{names['patch']}.weight"] = ((WIDTH, 3, PATCH, PATCH), "patch")
    if family == "timm":
        shapes["patch_embed.proj.bias"] = ((WIDTH,), "stream")
    else:
        shapes |= {
            f"{names['pre']}.weight": ((WIDTH,), "small scale"),
            f"{names['pre']}.bias": ((WIDTH,), "stream"),
        }
    shapes |= {
        f"{names['norm']}.weight": ((WIDTH,), "scale"),
        f"{names['norm']}.bias": ((WIDTH,), "bias"),
    }
    for i in range(DEPTH):
        block = f"{names['block']}.{i}"
        for norm in (names["norm1"], names["norm2"]):
            shapes |= {
                f"{block}.{norm}.weight": ((WIDTH,), "scale"),
                f"{block}.{norm}.bias": ((WIDTH,), "bias"),
            }
        qkv, out, fc1, fc2 = (f"{block}.{names[part]}" for part in ("qkv", "out", "fc1", "fc2"))
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
    """The name that models trained further in AugReg's framework give to the same array."""
    return (
        key.replace("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0")
        .replace("LayerNorm_2", "LayerNorm_1")
        .replace("MlpBlock_3", "MlpBlock_0")
    )


def random_weights(family, seed=0):
    """{key: float32 array} of the backbone alone, every entry random, biases included."""
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
    """Writes {key: array} as a file of that container; the suffix of `path` is the container's."""
    suffix = {"npz": ".npz", "npz_float64": ".npz", "safetensors": ".safetensors"}.get(
        container, ".pth"
    )
    path = Path(path).with_suffix(suffix)
    if suffix == ".npz":
        np.savez(
            path,
            **{
                key: value.astype(np.float64) if container == "npz_float64" else value
                for key, value in weights.items()
            },
        )
        return path
    dtype = torch.float16 if container.endswith("float16") else torch.float32
    tensors = {key: torch.from_numpy(value).to(dtype) for key, value in weights.items()}
    if container.endswith("module_prefix"):
        tensors = {f"module.{key}": value for key, value in tensors.items()}
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
    elif container.startswith("torchscript"):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch.jit is deprecated; OpenAI's archives are of that kind
            torch.jit.trace(holder(tensors), torch.ones(1)).save(str(path))
    elif container in ("state_dict", "wrapped_module_prefix"):
        torch.save({"state_dict": tensors, "epoch": 3, "arch": "vit"}, path)
    elif container == "model":
        torch.save({"model": tensors, "epoch": 3}, path)
    else:
        torch.save(tensors, path)
    return path


def usual_file(folder, family, weights=None):
    """The file a family mostly comes in; by default with all that such files hold beside the backbone."""
    return save(
        folder / "weights",
        whole_file(family) if weights is None else weights,
        "npz" if "augreg" in family else "bare",
    )


def holder(tensors):
    """A module whose state dict has exactly these keys: TorchScript archives are saved modules."""

    class Holder(nn.Module):
        def forward(self, x):
            return x

    root = Holder()
    for key, value in tensors.items():
        *parents, leaf = key.split(".")
        at = root
        for name in parents:
            if name not in dict(at.named_children()):
                at.add_module(name, nn.Module())
            at = dict(at.named_children())[name]
        at.register_buffer(leaf, value)
    return root


def whole_file(family, seed=0):
    """The backbone's arrays, and the others that such files hold."""
    rng = np.random.default_rng(seed + 1)
    return random_weights(family, seed) | {
        key: rng.normal(size=s).astype(np.float32) for key, s in IGNORED[family].items()
    }


# ---- the oracle: a ViT in numpy float64 ----------------------------------------------------------


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
    """The file's arrays as the equations take them: kernels (in, out), heads apart (in, heads, dim), the table (N+1, D)."""
    w = {key: value.astype(np.float64) for key, value in weights.items()}
    if family == "augreg_variant":
        return equations(
            "augreg", {key: weights[augreg_variant_key(key)] for key in shapes_of("augreg")}
        )
    if family == "augreg":

        def dense(name):
            return w[f"{name}/kernel"], w[f"{name}/bias"]

        def scale_and_bias(name):
            return w[f"{name}/scale"], w[f"{name}/bias"]

        def block(i):
            at = f"Transformer/encoderblock_{i}"
            attention = f"{at}/MultiHeadDotProductAttention_1"
            return dict(
                {part: dense(f"{attention}/{part}") for part in ("query", "key", "value", "out")},
                norm1=scale_and_bias(f"{at}/LayerNorm_0"),
                norm2=scale_and_bias(f"{at}/LayerNorm_2"),
                fc1=dense(f"{at}/MlpBlock_3/Dense_0"),
                fc2=dense(f"{at}/MlpBlock_3/Dense_1"),
            )

        return dict(
            patch=dense("embedding"),
            cls=w["cls"][0, 0],
            pre=None,
            blocks=[block(i) for i in range(DEPTH)],
            table=w["Transformer/posembed_input/pos_embedding"][0],
            norm=scale_and_bias("Transformer/encoder_norm"),
        )
    clip = family == "clip"

    def pair(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    def linear(name):
        return w[f"{name}.weight"].T, w[f"{name}.bias"]

    def torch_block(i):
        at = f"visual.transformer.resblocks.{i}" if clip else f"blocks.{i}"
        joined = f"{at}.attn.in_proj_" if clip else f"{at}.attn.qkv."
        parts = {}
        for number, part in enumerate(("query", "key", "value")):  # rows: queries, keys, values
            rows = slice(number * WIDTH, (number + 1) * WIDTH)
            parts[part] = (
                w[f"{joined}weight"][rows].T.reshape(WIDTH, HEADS, -1),
                w[f"{joined}bias"][rows].reshape(HEADS, -1),
            )
        kernel, bias = linear(f"{at}.attn.out_proj" if clip else f"{at}.attn.proj")
        return dict(
            norm1=pair(f"{at}.ln_1" if clip else f"{at}.norm1"),
            **parts,
            out=(kernel.reshape(HEADS, -1, WIDTH), bias),
            norm2=pair(f"{at}.ln_2" if clip else f"{at}.norm2"),
            fc1=linear(f"{at}.mlp.c_fc" if clip else f"{at}.mlp.fc1"),
            fc2=linear(f"{at}.mlp.c_proj" if clip else f"{at}.mlp.fc2"),
        )

    patch = w["visual.conv1.weight" if clip else "patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    return dict(
        patch=(patch, w.get("patch_embed.proj.bias", 0)),
        blocks=[torch_block(i) for i in range(DEPTH)],
        cls=w["visual.class_embedding"] if clip else w["cls_token"][0, 0],
        table=w["visual.positional_embedding"] if clip else w["pos_embed"][0],
        pre=pair("visual.ln_pre") if clip else pair("norm_pre") if family == "timm_clip" else None,
        norm=pair("visual.ln_post" if clip else "norm"),
    )


def oracle(family, weights, images, *, activation=None, table=None):
    """images (B, 3, H, W) -> (B, D): the CLS token after the final norm, from the arrays of the file."""
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


def worst(got, want):
    assert got.shape == want.shape
    return np.abs(got - want).max()


# ---- helpers -------------------------------------------------------------------------------------


def small_vit(**changes):
    return model.ViT(
        **(
            dict(image_size=IMAGE, patch_size=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS)
            | changes
        )
    )


def random_images(size=IMAGE, seed=0):
    return np.random.default_rng(seed + 2).normal(size=(4, 3, size, size)).astype(np.float32)


def quiet_load(vit, path, **options):
    """load, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        preprocessing = pretrained.load(vit, path, **options)
    return preprocessing, [str(warning.message) for warning in caught]


def embed(vit, images):
    with torch.no_grad():
        return vit(torch.from_numpy(images)).double().numpy()


def refused(path, vit=None, **options):
    """The message of the refusal, less the path; it must be one printable line with the path, and the ViT must be as it was."""
    vit = small_vit(activation="quick_gelu", norm_eps=1e-4) if vit is None else vit
    state, architecture = (
        {key: value.clone() for key, value in vit.state_dict().items()},
        dict(vit.architecture),
    )
    layers = [
        (m.eps if isinstance(m, nn.LayerNorm) else getattr(m, "activation", None))
        for m in vit.modules()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(pretrained.WeightsError) as caught:
            pretrained.load(vit, path, **options)
    message = str(caught.value)
    assert message.isprintable(), f"line ends or a terminal's escape codes: {message!r}"
    assert str(path) in message, f"{message!r} does not name {path}"
    assert vit.architecture == architecture
    assert [
        (m.eps if isinstance(m, nn.LayerNorm) else getattr(m, "activation", None))
        for m in vit.modules()
    ] == layers
    assert list(vit.state_dict()) == list(state)
    for key, value in vit.state_dict().items():
        assert torch.equal(value, state[key]), f"{key} changed although the file was refused"
    return message.replace(str(path), "PATH")


def names(message, *keys):
    """Whether the message has one of the keys as a whole word."""
    return any(re.search(rf"(?<![\w./]){re.escape(key)}(?![\w/]|\.\w)", message) for key in keys)


# ---- the weights end where the equations want them -----------------------------------------------


@pytest.mark.parametrize("family, container", CONTAINERS, ids=str)
def test_embedding_and_cosines_equal_the_oracle(tmp_path, family, container):
    weights = whole_file(family)
    path = save(tmp_path / "weights", weights, container)
    if container.endswith("float16"):
        weights = {key: value.astype(np.float16) for key, value in weights.items()}
    vit, images = small_vit(), random_images()
    quiet_load(vit, path)
    want, got = oracle(family, weights, images), embed(vit, images)
    assert worst(got, want) < TOLERANCE, f"embeddings differ by {worst(got, want):.2e}"
    assert worst(cosines(got), cosines(want)) < TOLERANCE, (
        f"cosines differ by {worst(cosines(got), cosines(want)):.2e}"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_can_tell_activations_and_epsilons_apart(tmp_path, family):
    """Without this the equality above would say nothing about them."""
    weights, images = random_weights(family), random_images()
    own = FAMILIES[family][0]
    want = oracle(family, weights, images)
    for other in {"gelu", "gelu_tanh", "quick_gelu"} - {own}:
        assert worst(oracle(family, weights, images, activation=other), want) > 2 * TOLERANCE
    vit = small_vit()
    quiet_load(vit, usual_file(tmp_path, family, weights))
    for number, module in enumerate(m for m in vit.modules() if isinstance(m, nn.LayerNorm)):
        eps, module.eps = module.eps, 1e-6 if module.eps == 1e-5 else 1e-5
        assert worst(embed(vit, images), want) > 2 * TOLERANCE, (
            f"epsilon of LayerNorm {number} does not show"
        )
        module.eps = eps


@pytest.mark.parametrize(
    "family, activation",
    [("clip", "gelu"), ("timm_clip", "quick_gelu"), ("timm", "gelu_tanh"), ("augreg", "gelu")],
)
def test_the_activation_can_be_overridden(tmp_path, family, activation):
    weights, images = random_weights(family), random_images()
    path, vit = usual_file(tmp_path, family, weights), small_vit()
    _, texts = quiet_load(vit, path, activation=activation)
    assert texts == [] and vit.architecture["activation"] == activation
    assert (
        worst(embed(vit, images), oracle(family, weights, images, activation=activation))
        < TOLERANCE
    )


@pytest.mark.parametrize(
    "family, container, warned",
    [
        ("clip", "bare", True),  # open_clip saves float32: OpenAI's or LAION's
        ("clip", "float16", False),  # OpenAI's own files are float16
        ("timm_clip", "bare", True),
        ("timm", "bare", False),
        ("augreg", "npz", False),
    ],
)
def test_only_an_activation_the_file_cannot_tell_is_warned_of(tmp_path, family, container, warned):
    _, texts = quiet_load(small_vit(), save(tmp_path / "weights", whole_file(family), container))
    assert ["activation" in text and "pass activation=" in text for text in texts] == [
        True
    ] * warned, texts


# ---- what comes with a family --------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [dict(activation="gelu", norm_eps=1e-3), dict(activation="quick_gelu", pre_norm=True)],
    ids=["plain", "pre_norm"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_the_family_replace_those_of_the_vit(tmp_path, family, start):
    activation, eps, pre_norm, _ = FAMILIES[family]
    vit = small_vit(**start)
    quiet_load(vit, usual_file(tmp_path, family))
    assert [vit.architecture[key] for key in ("activation", "norm_eps", "pre_norm")] == [
        activation,
        eps,
        pre_norm,
    ]
    rebuilt = model.ViT(**vit.architecture)
    assert list(rebuilt.state_dict()) == list(vit.state_dict())
    rebuilt.load_state_dict(vit.state_dict())
    images = random_images()
    assert np.array_equal(embed(rebuilt, images), embed(vit, images))
    assert worst(embed(vit, images), oracle(family, random_weights(family), images)) < TOLERANCE


def test_one_vit_can_go_from_family_to_family(tmp_path):
    vit, images = small_vit(), random_images()
    for turn, family in enumerate(("clip", "augreg", "timm_clip", "timm", "clip")):
        path = save(
            tmp_path / f"{turn}_{family}",
            random_weights(family, seed=turn),
            "npz" if family == "augreg" else "bare",
        )
        quiet_load(vit, path)
        assert (
            worst(embed(vit, images), oracle(family, random_weights(family, seed=turn), images))
            < TOLERANCE
        ), family
    assert all(parameter.requires_grad for parameter in vit.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vit_of_another_dtype_keeps_it(tmp_path, family):
    vit, images = small_vit().double(), random_images().astype(np.float64)
    quiet_load(vit, usual_file(tmp_path, family))
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float64}
    assert worst(embed(vit, images), oracle(family, random_weights(family), images)) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_image_statistics_of_the_family(tmp_path, family):
    preprocessing, _ = quiet_load(small_vit(), usual_file(tmp_path, family))
    assert (preprocessing.mean, preprocessing.std) == FAMILIES[family][3]


def test_path_may_be_a_string_or_a_path(tmp_path):
    for path in (
        save(tmp_path / "a", random_weights("timm")),
        save(tmp_path / "b", random_weights("augreg"), "npz"),
        save(tmp_path / "c", random_weights("clip"), "torchscript_float16"),
    ):
        first, second = small_vit(), small_vit()
        quiet_load(first, str(path))
        quiet_load(second, path)
        assert all(
            torch.equal(value, second.state_dict()[key])
            for key, value in first.state_dict().items()
        )


# ---- the position table --------------------------------------------------------------------------


def resized_by_torch(table, grid):
    """(1 + n*n, D) -> (1 + grid*grid, D), column by column of the table."""
    n = math.isqrt(len(table) - 1)
    planes = torch.from_numpy(table[1:].T.astype(np.float32).reshape(-1, 1, n, n))
    resized = [
        F.interpolate(plane[None], size=(grid, grid), mode="bicubic", antialias=True)
        .numpy()
        .ravel()
        for plane in planes
    ]
    return np.concatenate([table[:1], np.stack(resized, axis=1)])


@pytest.mark.parametrize("image", [16, 24, 48, 56])
@pytest.mark.parametrize("family", ["augreg", "timm", "clip"])
def test_table_of_another_grid_is_resized_with_a_warning(tmp_path, family, image):
    weights, images = random_weights(family), random_images(image)
    table = equations(family, weights)["table"]
    vit = small_vit(image_size=image)
    _, texts = quiet_load(vit, usual_file(tmp_path, family, weights))
    want, got = resized_by_torch(table, image // PATCH), vit.pos_embed[0].detach().numpy()
    assert np.array_equal(got[0], table[0].astype(np.float32)), "the CLS row is not the file's"
    assert worst(got, want) < 1e-7
    assert worst(embed(vit, images), oracle(family, weights, images, table=want)) < TOLERANCE
    about_table = [text for text in texts if "position" in text]
    grid = image // PATCH
    assert (
        len(about_table) == 1
        and f"{GRID} x {GRID}" in about_table[0]
        and f"{grid} x {grid}" in about_table[0]
    ), texts


@pytest.mark.parametrize("family", FAMILIES)
def test_table_of_the_same_grid_is_untouched_and_silent(tmp_path, family):
    weights, vit = random_weights(family), small_vit()
    _, texts = quiet_load(vit, usual_file(tmp_path, family, weights))
    assert np.array_equal(
        vit.pos_embed[0].detach().numpy(), equations(family, weights)["table"].astype(np.float32)
    )
    assert not [text for text in texts if "position" in text]


@pytest.mark.parametrize("image", [16, 48])
def test_constant_table_stays_constant(tmp_path, image):
    weights = random_weights("timm")
    weights["pos_embed"][:, 1:] = weights["pos_embed"][:, 1:2]
    vit = small_vit(image_size=image)
    quiet_load(vit, save(tmp_path / "weights", weights))
    table = vit.pos_embed[0].detach().numpy()
    assert np.array_equal(table[0], weights["pos_embed"][0, 0])
    assert np.abs(table[1:] - weights["pos_embed"][0, 1]).max() < 1e-7


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), grid=st.integers(1, 9), seed=st.integers(0, 99))
def test_resize_commutes_with_transposition_and_is_linear(n, grid, seed):
    """Rows and columns are treated alike, and scaling or adding tables before or after is the same."""
    rng = np.random.default_rng(seed)
    first, second = (
        torch.from_numpy(rng.normal(size=(1, 1 + n * n, 5)).astype(np.float32)) for _ in range(2)
    )

    def transposed(table):
        side = math.isqrt(table.shape[1] - 1)
        return torch.cat(
            [table[:, :1], table[:, 1:].reshape(1, side, side, -1).transpose(1, 2).flatten(1, 2)],
            dim=1,
        )

    resized = pretrained.resize_position_table(first, grid)
    assert resized.shape == (1, 1 + grid * grid, 5)
    assert torch.allclose(
        pretrained.resize_position_table(transposed(first), grid), transposed(resized), atol=1e-5
    )
    both = pretrained.resize_position_table(2 * first - second, grid)
    assert torch.allclose(
        both, 2 * resized - pretrained.resize_position_table(second, grid), atol=1e-5
    )


def test_table_that_is_no_square_is_refused(tmp_path):
    weights = random_weights("timm")
    weights["pos_embed"] = weights["pos_embed"][:, :-1]  # 16 rows: 15 patches
    assert "16 rows" in refused(save(tmp_path / "weights", weights))


@pytest.mark.parametrize("rows", [0, 1])
def test_table_without_patches_is_refused(tmp_path, rows):
    weights = random_weights("timm")
    weights["pos_embed"] = weights["pos_embed"][:, :rows]
    refused(save(tmp_path / "weights", weights))


# ---- keys missing or left over -------------------------------------------------------------------

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


def timm_name(family, key):
    """timm's name of a file's key: the refusal may name either."""
    for old, new in TIMM_NAMES[family]:
        key = key.replace(old, new)
    return key


@pytest.mark.parametrize("family, key", KEYS, ids=str)
def test_a_missing_key_is_named(tmp_path, family, key):
    weights = whole_file(family)
    del weights[key]
    message = refused(usual_file(tmp_path, family, weights))
    assert names(message, key, timm_name(family, key)), message


LEFT_OVER = {
    "augreg": [
        "register",
        "Transformer/extra",
        "Transformer/encoderblock_1/LayerNorm_3/scale",
        "Transformer/encoderblock_1/gate/kernel",
        "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/gate/bias",
        "Transformer/encoderblock_1/MlpBlock_3/Dense_2/bias",
    ],
    "timm": [
        "blocks.1.ls1.gamma",
        "reg_token",
        "blocks.1.attn.q_norm.weight",
        "fc_norm.weight",
        "patch_embed.norm.weight",
    ],
    "timm_clip": ["patch_embed.proj.bias", "blocks.0.ls1.gamma"],
    "clip": [
        "visual.attn_pool.query",
        "visual.transformer.resblocks.1.ls_1.gamma",
        "visual.conv1.bias",
    ],
}


@pytest.mark.parametrize(
    "family, key", [(family, key) for family, keys in LEFT_OVER.items() for key in keys], ids=str
)
def test_a_left_over_key_is_named(tmp_path, family, key):
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
def test_two_names_for_one_augreg_array_are_refused(tmp_path, key):
    """One of the two would win in silence."""
    weights = whole_file("augreg")
    key = f"Transformer/encoderblock_1/{key}"
    weights[augreg_variant_key(key)] = weights[key] + 1
    message = refused(save(tmp_path / "weights", weights, "npz"))
    assert names(message, key, augreg_variant_key(key), timm_name("augreg", key)), message


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, said",
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
def test_another_size_is_refused(tmp_path, family, change, said):
    message = refused(usual_file(tmp_path, family), small_vit(**change))
    assert all(text in message for text in said), message


@pytest.mark.parametrize("family", ["augreg", "augreg_variant"])
def test_another_number_of_heads_is_refused_where_the_file_tells_it(tmp_path, family):
    message = refused(save(tmp_path / "weights", whole_file(family), "npz"), small_vit(heads=6))
    assert names(message, "3") and names(message, "6"), message


@pytest.mark.parametrize(
    "family, key",
    [
        ("augreg", "embedding/kernel"),
        ("augreg", "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"),
        ("augreg", "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/bias"),
        ("augreg", "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"),
        ("augreg", "Transformer/posembed_input/pos_embedding"),
        ("timm", "pos_embed"),
        ("timm", "norm.weight"),
        ("clip", "visual.positional_embedding"),
        ("clip", "visual.class_embedding"),
        ("clip", "visual.conv1.weight"),
    ],
    ids=str,
)
def test_an_array_of_another_rank_is_refused(tmp_path, family, key):
    weights = whole_file(family)
    weights[key] = weights[key].ravel()[:-1]
    refused(usual_file(tmp_path, family, weights))


def test_an_unknown_activation_is_refused(tmp_path):
    vit = small_vit()
    before, architecture = (
        {key: value.clone() for key, value in vit.state_dict().items()},
        dict(vit.architecture),
    )
    with pytest.raises(ValueError, match="'relu'.*gelu_tanh"):
        pretrained.load(vit, usual_file(tmp_path, "clip"), activation="relu")
    assert vit.architecture == architecture and list(vit.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


# ---- files that are none -------------------------------------------------------------------------


class Bomb:
    """A pickle of it would run code: it makes the file at `target`."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def bad_files(folder):
    """{what: writes it and gives its path}"""
    timm, augreg, shares = random_weights("timm"), random_weights("augreg"), (0.02, 0.5, 0.99)

    def raw(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    def saved(content, name="weights.pth"):
        torch.save(content, folder / name)
        return folder / name

    def cut(path, share):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        return path

    def directory(name):
        (folder / name).mkdir()
        return folder / name

    def npz(**arrays):
        np.savez(folder / "weights.npz", **arrays)
        return folder / "weights.npz"

    png, text = b"\x89PNG\r\n\x1a\n" + bytes(200), b"line one\nline two\n"
    resnet = {
        "visual.conv1.weight": torch.ones(4, 3, 3, 3),
        "visual.attnpool.positional_embedding": torch.ones(50, 8),
        "visual.layer1.0.conv1.weight": torch.ones(4, 4, 1, 1),
        "positional_embedding": torch.ones(7, 8),
    }
    return {
        **{
            f"missing{suffix}": lambda suffix=suffix: folder / f"none{suffix}"
            for suffix in (".pth", ".pt", ".npz", ".bin")
        },
        **{
            f"empty{suffix}": lambda suffix=suffix: raw(f"empty{suffix}", b"")
            for suffix in (".pth", ".pt", ".npz")
        },
        **{
            f"directory{suffix}": lambda suffix=suffix: directory(f"folder{suffix}")
            for suffix in (".pth", ".npz")
        },
        **{
            f"png{suffix}": lambda suffix=suffix: raw(f"image{suffix}", png)
            for suffix in (".pth", ".npz", ".png")
        },
        **{
            f"text{suffix}": lambda suffix=suffix: raw(f"text{suffix}", text)
            for suffix in (".pth", ".npz", ".txt")
        },
        **{
            f"npz cut at {share}": lambda share=share: cut(
                save(folder / "weights", augreg, "npz"), share
            )
            for share in shares
        },
        **{
            f"pth cut at {share}": lambda share=share: cut(save(folder / "weights", timm), share)
            for share in shares
        },
        "torchscript cut": lambda: cut(
            save(folder / "weights", random_weights("clip"), "torchscript"), 0.5
        ),
        "npz named pth": lambda: save(folder / "weights", augreg, "npz").rename(
            folder / "augreg.pth"
        ),
        "pth named npz": lambda: save(folder / "weights", timm).rename(folder / "timm.npz"),
        "npz of objects": lambda: npz(
            cls=np.array([Bomb(folder / "exploded"), None], dtype=object)
        ),
        "npz of strings": lambda: npz(cls=np.array(["a", "b"])),
        "npz of nothing": lambda: npz(),
        "one array": lambda: (
            np.save(folder / "array.npy", augreg["cls"]),
            (folder / "array.npy").rename(folder / "array.npz"),
        )[1],
        "pickled object": lambda: raw(
            "weights.pth", pickle.dumps({"state_dict": Bomb(folder / "exploded")})
        ),
        "saved object": lambda: saved(
            {"state_dict": timm_tensors(timm), "config": Bomb(folder / "exploded")}
        ),
        "saved module": lambda: saved(small_vit()),
        "tensor": lambda: saved(torch.ones(3)),
        "list": lambda: saved([torch.ones(3)]),
        "number": lambda: saved(3),
        "no keys": lambda: saved({}),
        "no tensors": lambda: saved({"state_dict": {"epoch": 3}}),
        "keys that are numbers": lambda: saved({0: torch.ones(3), 1: torch.ones(3)}),
        "another network": lambda: saved(
            {
                "conv1.weight": torch.ones(8, 3, 7, 7),
                "layer1.0.conv1.weight": torch.ones(8, 8, 3, 3),
            }
        ),
        "CLIP's ResNet": lambda: saved(resnet),
        "CLIP's text tower": lambda: saved(
            {"positional_embedding": torch.ones(7, 8), "ln_final.weight": torch.ones(8)}
        ),
        "open_clip around timm": lambda: saved(
            {f"visual.trunk.{key}": value for key, value in timm_tensors(timm).items()}
        ),
    }


def timm_tensors(weights):
    return {key: torch.from_numpy(value) for key, value in weights.items()}


@pytest.mark.parametrize("what", sorted(bad_files(Path())))
def test_a_file_of_another_kind_is_refused(tmp_path, what):
    refused(bad_files(tmp_path)[what]())
    assert not (tmp_path / "exploded").exists(), "a pickled object was brought to life"


@pytest.mark.parametrize(
    "content",
    [None, b"", b"no safetensors\n", struct.pack("<Q", 1 << 40) + b"{}"],
    ids=["missing", "empty", "text", "header"],
)
def test_a_bad_safetensors_file_is_refused(tmp_path, content):
    pytest.importorskip("safetensors")
    if content is not None:
        (tmp_path / "weights.safetensors").write_bytes(content)
    refused(tmp_path / "weights.safetensors")


def test_without_safetensors_the_remedy_is_named(tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "pip install safetensors" in refused(tmp_path / "weights.safetensors")


def test_a_tensor_under_a_wrappers_name_is_left_over(tmp_path):
    torch.save(
        timm_tensors(random_weights("timm")) | {"state_dict": torch.ones(1)},
        tmp_path / "weights.pth",
    )
    assert names(refused(tmp_path / "weights.pth"), "state_dict")


# ---- copied alone --------------------------------------------------------------------------------


def test_the_file_works_alone_with_torch_and_numpy(tmp_path):
    source = Path(pretrained.__file__).read_text()
    nodes = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    imported = {
        getattr(node, "module", alias.name).split(".")[0] for node in nodes for alias in node.names
    }
    assert imported - sys.stdlib_module_names == {"torch", "numpy", "safetensors"}
    (tmp_path / "pretrained.py").write_text(source)
    code = (
        "import sys; sys.path.insert(0, '.'); sys.modules['safetensors'] = None\n"
        "import pretrained, torch\n"
        "print(pretrained.__file__, tuple(pretrained.resize_position_table(torch.ones(1, 5, 6), 3).shape))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout and "(1, 10, 6)" in run.stdout


# The project's own checkpoints and weights --------------------------------------------------------------------------------------


def own_checkpoint(path, vit, **changes):
    state = {f"backbone.{key}": value for key, value in vit.state_dict().items()} | {
        "student_head.weight": torch.zeros(2, 2)
    }
    torch.save(
        {
            "model": state,
            "architecture": {"backbone": vit.architecture, "classes": {"a": 2}},
            "preprocessing": {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "antialias": True},
            **changes,
        },
        path,
    )
    return path


def test_own_checkpoints_carry_their_family_and_statistics(tmp_path):
    torch.manual_seed(0)
    source = pretrained_vit(activation="quick_gelu", norm_eps=1e-4)
    target = pretrained_vit(activation="gelu", norm_eps=1e-6)
    preprocessing = pretrained.load(target, own_checkpoint(tmp_path / "best.pt", source))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(target(images), source(images)), "weights, activation and epsilon"
    assert preprocessing == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def pretrained_vit(**changes):
    return model.ViT(
        image_size=32, patch_size=8, width=24, depth=2, heads=2, stem="conv", **changes
    )


def test_own_checkpoints_of_other_sizes_are_refused(tmp_path):
    path = own_checkpoint(tmp_path / "best.pt", pretrained_vit())
    for vit, named in (
        (model.ViT(32, 8, 24, 2, 3, stem="conv"), "attention heads"),
        (model.ViT(32, 8, 24, 3, 2, stem="conv"), "lacks"),
        (model.ViT(32, 8, 24, 2, 2), "lacks"),
    ):
        before = {key: value.clone() for key, value in vit.state_dict().items()}
        with pytest.raises(pretrained.WeightsError, match=named):
            pretrained.load(vit, path)
        assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    with pytest.raises(pretrained.WeightsError, match="architecture or preprocessing"):
        pretrained.load(
            pretrained_vit(),
            own_checkpoint(tmp_path / "bare.pt", pretrained_vit(), architecture={}),
        )


def test_compact_weights(tmp_path, capsys):
    """`python pretrained.py RUN/best.pt FILE.pt`: the backbone alone, in half precision, loads as the checkpoint does."""
    torch.manual_seed(0)
    source, target = pretrained_vit(), pretrained_vit()
    pretrained.main(
        [str(own_checkpoint(tmp_path / "best.pt", source)), str(tmp_path / "compact.pt")]
    )
    content = torch.load(tmp_path / "compact.pt", weights_only=True)
    assert set(content) == {"model", "architecture", "preprocessing"}
    assert all(
        key.startswith("backbone.") and value.dtype == torch.float16
        for key, value in content["model"].items()
    )
    assert pretrained.load(target, tmp_path / "compact.pt") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key].half().float()), key
    for source in ("none.pt", str(tmp_path / "compact.pt.txt")):
        (tmp_path / "compact.pt.txt").write_text("no checkpoint")
        with pytest.raises(SystemExit) as stop:
            pretrained.main([source, str(tmp_path / "other.pt")])
        assert stop.value.code == 2 and Path(source).name in capsys.readouterr().err
    assert not (tmp_path / "other.pt").exists()


@pytest.mark.parametrize("name", ["micro", "mini"])
def test_the_weights_that_ship(name):
    """They fill their size exactly, are small, and tell pictures apart far better than an untrained network."""
    path = pretrained.COMPACT[name]
    vit = model.ViT(**model.SIZES[name])
    assert pretrained.load(vit, path) == pretrained.HALF
    assert path.stat().st_size <= 4_000_000
    assert all(value.isfinite().all() for value in vit.state_dict().values())
