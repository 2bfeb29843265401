"""Tests of model.py: the ViT against torch's own encoder layers and timm's names, counts and activations; UDON's outputs against
numpy, its parameters' names, initialisation and gradients; what it refuses; that the file works copied out alone."""

import ast
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import model

SMALL = dict(image_size=32, patch_size=8, width=48, depth=2, heads=3)
ACTIVATIONS = {  # closed forms, float64
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
}
PUBLISHED = {  # size: (width, depth, heads, millions of parameters without a classifier at 224 x 224, patches of 16)
    "s16": (384, 12, 6, 21.67),
    "b16": (768, 12, 12, 85.80),
    "l16": (1024, 24, 16, 303.30),
}
TIMM_BLOCK = [
    f"{part}.{leaf}"
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for leaf in ("weight", "bias")
]
CLASSES = {"birds": 7, "cars": 5, "met-art": 3}
STUDENT, TEACHER = 16, 24
FAN_IN, FAN_OUT = (
    512,
    400,
)  # large enough that the sampling error of a standard deviation is below 0.2 %


def small_vit(**changes):
    return model.ViT(**(SMALL | changes))


def small_udon(seed=0, **changes):
    torch.manual_seed(seed)
    return model.UDON(
        small_vit(), CLASSES, **(dict(student_dim=STUDENT, teacher_dim=TEACHER) | changes)
    )


def images(batch=6, size=32, seed=1):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def shapes(module):
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def randomised(module, seed=2):
    """Every parameter random, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator)
                / max(parameter[0].numel(), 4) ** 0.5
            )
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return module


# ---- the ViT -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_norm", [False, True])
def test_parameters_carry_timms_names_and_shapes(pre_norm):
    width, hidden = 48, 192
    block = dict(
        zip(
            TIMM_BLOCK,
            [
                (width,),
                (width,),
                (3 * width, width),
                (3 * width,),
                (width, width),
                (width,),
                (width,),
                (width,),
                (hidden, width),
                (hidden,),
                (width, hidden),
                (width,),
            ],
        )
    )
    want = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 17, width),
        "patch_embed.proj.weight": (width, 3, 8, 8),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    want |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    want |= (
        {"norm_pre.weight": (width,), "norm_pre.bias": (width,)}
        if pre_norm
        else {"patch_embed.proj.bias": (width,)}
    )
    vit = small_vit(pre_norm=pre_norm)
    assert shapes(vit) == want
    assert set(vit.state_dict()) == set(want), (
        "a buffer beside the parameters would be a key that timm's files lack"
    )


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_parameter_counts(size):
    width, depth, heads, millions = PUBLISHED[size]
    with torch.device("meta"):
        vit = model.ViT(**model.SIZES[size])
    count = sum(parameter.numel() for parameter in vit.parameters())
    block = (
        4 * width * width + 4 * width + 8 * width * width + 5 * width + 4 * width
    )  # attention, MLP, two LayerNorms
    want = (
        (3 * 16 * 16 + 1) * width + (1 + 197 + 2) * width + depth * block
    )  # patches; CLS, table, last norm; blocks
    assert count == want
    assert round(count / 1e6, 2) == millions
    assert [block.attn.heads for block in vit.blocks] == [
        heads
    ] * depth  # the count cannot tell the heads


def test_default_is_b16():
    with torch.device("meta"):
        assert model.ViT().architecture == model.ViT(**model.SIZES["b16"]).architecture


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_closed_forms(name):
    x = np.linspace(-8, 8, 801)
    want = np.array([ACTIVATIONS[name](value) for value in x])
    got = model.ACTIVATIONS[name](torch.from_numpy(x)).numpy()
    assert np.abs(got - want).max() < 1e-12
    assert set(model.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_eps", [1e-6, 1e-2])
def test_forward_equals_torchs_encoder_layers(activation, pre_norm, norm_eps):
    """torch.nn.TransformerEncoderLayer and unfolded patches are another implementation of the same equations."""
    vit = randomised(
        small_vit(activation=activation, norm_eps=norm_eps, pre_norm=pre_norm, mlp_ratio=3.0)
    ).double()
    w, width, x = vit.state_dict(), 48, images().double()
    patches = F.unfold(x, 8, stride=8).transpose(1, 2)  # (B, N, 3 * 8 * 8)
    want = F.linear(
        patches,
        w["patch_embed.proj.weight"].flatten(1),
        None if pre_norm else w["patch_embed.proj.bias"],
    )
    want = torch.cat([w["cls_token"].repeat(len(x), 1, 1), want], dim=1) + w["pos_embed"]
    if pre_norm:
        want = F.layer_norm(want, (width,), w["norm_pre.weight"], w["norm_pre.bias"], norm_eps)
    for i in range(2):
        layer = nn.TransformerEncoderLayer(
            width,
            3,
            144,
            dropout=0,
            activation=lambda y: y.clone().apply_(ACTIVATIONS[activation]),
            layer_norm_eps=norm_eps,
            batch_first=True,
            norm_first=True,
            dtype=torch.float64,
        )
        names = [
            "norm1.weight",
            "norm1.bias",
            "self_attn.in_proj_weight",
            "self_attn.in_proj_bias",
            "self_attn.out_proj.weight",
            "self_attn.out_proj.bias",
            "norm2.weight",
            "norm2.bias",
            "linear1.weight",
            "linear1.bias",
            "linear2.weight",
            "linear2.bias",
        ]
        layer.load_state_dict(
            {name: w[f"blocks.{i}.{timm}"] for name, timm in zip(names, TIMM_BLOCK)}
        )
        with torch.no_grad():
            want = layer(want)
    want = F.layer_norm(want, (width,), w["norm.weight"], w["norm.bias"], norm_eps)[:, 0]
    with torch.no_grad():
        got = vit(x)
    assert got.shape == (6, width)
    assert float((got - want).abs().max()) < 1e-10


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(activation="quick_gelu", norm_eps=1e-5, pre_norm=True),
        dict(mlp_ratio=2.0, heads=4),
        dict(stem="conv", activation="gelu"),
        dict(image_size=64, patch_size=16, depth=1),
    ],
    ids=str,
)
def test_architecture_rebuilds_the_module(changes):
    vit = randomised(small_vit(**changes))
    rebuilt = model.ViT(**vit.architecture)
    assert shapes(rebuilt) == shapes(vit)
    rebuilt.load_state_dict(vit.state_dict())
    x = images(2, vit.architecture["image_size"])
    with torch.no_grad():
        assert torch.equal(rebuilt(x), vit(x))


def test_set_family_switches_everything_and_back():
    vit, x = randomised(small_vit()), images(2)
    with torch.no_grad():
        before = vit(x)
    vit.set_family("quick_gelu", 1e-5, True)
    assert shapes(vit) == shapes(small_vit(pre_norm=True))
    assert {m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    fresh = small_vit(activation="quick_gelu", norm_eps=1e-5, pre_norm=True)
    assert fresh.architecture == vit.architecture
    fresh.load_state_dict(vit.state_dict())
    with torch.no_grad():
        assert torch.equal(vit(x), fresh(x)) and not torch.equal(vit(x), before)
    vit.set_family("gelu_tanh", 1e-6, False)
    assert shapes(vit) == shapes(small_vit()) and vit.architecture == small_vit().architecture
    with torch.no_grad():
        vit.patch_embed.proj.bias.copy_(
            randomised(small_vit()).patch_embed.proj.bias
        )  # the one tensor that was dropped
        assert torch.equal(vit(x), before)


def test_images_of_a_batch_do_not_see_each_other():
    vit, x = randomised(small_vit()).double(), images().double()
    with torch.no_grad():
        assert torch.allclose(
            torch.cat([vit(x[i : i + 1]) for i in range(len(x))]), vit(x), rtol=0, atol=1e-12
        )


def test_initial_weights_of_the_vit():
    """timm's JAX-like start: xavier-uniform blocks with zero biases, a position table of std 0.02, a CLS token near zero."""
    torch.manual_seed(0)
    vit = model.ViT(image_size=64, patch_size=8, width=192, depth=1, heads=3)
    for name, parameter in vit.blocks.state_dict().items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.999 * bound < float(parameter.abs().max()) <= bound, name
            assert abs(float(parameter.std()) / (bound / 3**0.5) - 1) < 0.02, name
    assert abs(float(vit.pos_embed.detach().std()) / 0.02 - 1) < 0.03
    assert 0 < float(vit.cls_token.detach().abs().max()) < 1e-5


# ---- the conv stem -------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16, 32])
def test_conv_stem_gives_one_token_per_patch(patch_size):
    vit = model.ViT(
        image_size=2 * patch_size, patch_size=patch_size, width=32, depth=1, heads=2, stem="conv"
    )
    x = images(3, 2 * patch_size)
    assert vit.patch_embed(x).shape == (3, 4, 32)
    assert vit(x).shape == (3, 32)


def test_conv_stem_equals_its_equations():
    """3x3 convolutions of stride 2, each with a norm over the whole image and a ReLU, then a 1x1 one; kernels of mean 0, norm 1."""
    torch.manual_seed(0)
    embed, x = small_vit(stem="conv").patch_embed, images()
    w = {name: parameter.detach() for name, parameter in embed.proj.named_parameters()}
    assert len(w) == 3 * 3 + 2  # three halvings make patches of 8

    def standardised(kernel):
        rows = kernel.double().flatten(1).numpy()
        rows = rows - rows.mean(1, keepdims=True)
        return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).reshape(
            kernel.shape
        )

    want = x.double()
    for i in (0, 3, 6):
        want = F.conv2d(F.pad(want, (1, 1, 1, 1)), standardised(w[f"{i}.weight"]), stride=2)
        mean, variance = (
            want.mean((1, 2, 3), keepdim=True),
            want.var((1, 2, 3), keepdim=True, correction=0),
        )
        scale, shift = (w[f"{i + 1}.{leaf}"].double()[:, None, None] for leaf in ("weight", "bias"))
        want = ((want - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)
    want = (
        torch.einsum("bchw,dc->bhwd", want, standardised(w["9.weight"])[:, :, 0, 0])
        + w["9.bias"].double()
    )
    with torch.no_grad():
        assert float((embed(x) - want.flatten(1, 2)).abs().max()) < 1e-5


def test_conv_stem_orders_tokens_like_the_patch_stem():
    """Row by row: a change in one patch moves that patch's token the most; in its upper left quarter, on which convolutions of
    stride 2 padded by 1 are centred. Otherwise the position table would mean other places."""
    torch.manual_seed(0)
    for stem in ("patch", "conv"):
        embed, x = small_vit(stem=stem).patch_embed, images(1)
        for row, column in ((0, 0), (0, 3), (3, 0), (2, 1)):
            changed = x.clone()
            changed[
                :, :, 8 * row : 8 * row + 4, 8 * column : 8 * column + 4
            ] *= -1  # the image's statistics stay
            with torch.no_grad():
                moved = (embed(changed) - embed(x)).norm(dim=2)[0]
            assert int(moved.argmax()) == 4 * row + column, stem


@pytest.mark.parametrize("patch_size", [1, 6, 7, 12])
def test_conv_stem_needs_a_power_of_two(patch_size):
    with pytest.raises(ValueError, match=rf"(?s)\b{patch_size}\b.*power of 2"):
        small_vit(image_size=84, patch_size=patch_size, stem="conv")


def test_the_mini_size_is_compact():
    vit = model.ViT(**model.SIZES["mini"])
    assert vit(images(2, vit.architecture["image_size"])).shape == (2, vit.architecture["width"])
    assert sum(parameter.numel() for parameter in vit.parameters()) < 2.5e6


# ---- what a ViT refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 24, 24), (2, 3, 32, 40), (2, 3, 64, 64), (2, 1, 32, 32), (2, 4, 32, 32), (3, 32, 32)],
    ids=str,
)
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(ValueError) as caught:
        small_vit()(torch.zeros(shape))
    assert str(shape) in str(caught.value) and "(B, 3, 32, 32)" in str(caught.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(heads=5), ["48", "5", "heads"]),
        (dict(patch_size=7), ["32", "7", "patch"]),
        (dict(activation="relu"), ["'relu'", "gelu_tanh"]),
        (dict(stem="mlp"), ["'mlp'", "'conv'"]),
        (dict(stem="conv", pre_norm=True), ["pre_norm", "'conv'"]),
    ],
    ids=str,
)
def test_sizes_and_names_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError) as caught:
        small_vit(**changes)
    assert all(text in str(caught.value) for text in said), caught.value


@pytest.mark.parametrize(
    "family",
    [("relu", 1e-5, True), ("gelu", 1e-5, True)],
    ids=["activation", "pre_norm on a conv stem"],
)
def test_a_refused_family_changes_nothing(family):
    vit = small_vit(stem="conv")
    before, architecture = shapes(vit), dict(vit.architecture)
    with pytest.raises(ValueError):
        vit.set_family(*family)
    assert shapes(vit) == before and vit.architecture == architecture
    assert {m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.activation for m in vit.modules() if isinstance(m, model.Mlp)} == {"gelu_tanh"}


# ---- UDON: outputs -------------------------------------------------------------------------------


def test_outputs_have_the_promised_fields_shapes_and_ranges():
    assert model.Outputs._fields == (
        "backbone",
        "student",
        "teacher",
        "student_cosines",
        "teacher_cosines",
    )
    udon, x = small_udon(), images()
    for domain, count in CLASSES.items():
        out = udon(x, domain)
        assert isinstance(out, model.Outputs)
        assert [tuple(tensor.shape) for tensor in out] == [
            (6, 48),
            (6, STUDENT),
            (6, TEACHER),
            (6, count),
            (6, count),
        ]
        for name in ("backbone", "student", "teacher"):
            assert torch.allclose(getattr(out, name).norm(dim=1), torch.ones(6), atol=1e-6), name
        for name in ("student_cosines", "teacher_cosines"):
            assert float(getattr(out, name).detach().abs().max()) <= 1 + 1e-6, name


def test_outputs_equal_the_equations_in_numpy():
    udon, x = randomised(small_udon()), images()
    w = {name: parameter.detach().double().numpy() for name, parameter in udon.named_parameters()}

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    with torch.no_grad():
        embeddings = udon.backbone(x).double().numpy()
        for domain in CLASSES:
            backbone = unit(embeddings)
            student = unit(backbone @ w["student_head.weight"].T + w["student_head.bias"])
            teacher = unit(
                backbone @ w[f"teacher_heads.{domain}.weight"].T + w[f"teacher_heads.{domain}.bias"]
            )
            want = (
                backbone,
                student,
                teacher,
                student @ unit(w[f"student_classifiers.{domain}.weight"]).T,
                teacher @ unit(w[f"teacher_classifiers.{domain}.weight"]).T,
            )
            for name, expected, got in zip(model.Outputs._fields, want, udon(x, domain)):
                assert np.abs(got.numpy() - expected).max() < 2e-6, f"{domain}: {name}"


def test_embed_is_the_student_and_needs_no_domain():
    udon, x = small_udon(), images()
    with torch.no_grad():
        assert torch.equal(udon.embed(x), udon(x, "cars").student)
        assert torch.equal(udon.embed(x), udon(x, "birds").student)
        assert torch.equal(udon.embed_backbone(x), udon(x, "cars").backbone)


def test_a_head_scaled_along_with_its_bias_embeds_the_same():
    udon, x = randomised(small_udon()), images()
    with torch.no_grad():
        before = udon(x, "cars")
        for head in (udon.student_head, udon.teacher_heads["cars"]):
            head.weight.mul_(5)
            head.bias.mul_(5)
        after = udon(x, "cars")
    for name, first, second in zip(model.Outputs._fields, before, after):
        assert torch.allclose(first, second, atol=1e-6), name


# ---- UDON: parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("teacher_dim", [TEACHER, 0])
def test_parameters_are_named_by_role_and_domain(teacher_dim):
    want = {f"backbone.{name}": shape for name, shape in shapes(small_vit()).items()}
    want |= {"student_head.weight": (STUDENT, 48), "student_head.bias": (STUDENT,)}
    want |= {
        f"student_classifiers.{domain}.weight": (count, STUDENT)
        for domain, count in CLASSES.items()
    }
    if teacher_dim:
        want |= {f"teacher_heads.{domain}.weight": (teacher_dim, 48) for domain in CLASSES}
        want |= {f"teacher_heads.{domain}.bias": (teacher_dim,) for domain in CLASSES}
        want |= {
            f"teacher_classifiers.{domain}.weight": (count, teacher_dim)
            for domain, count in CLASSES.items()
        }
    udon = small_udon(teacher_dim=teacher_dim)
    assert shapes(udon) == want
    assert set(udon.state_dict()) == set(want)


def test_default_dimensions_are_the_papers():
    udon = model.UDON(small_vit(), {"a": 2})
    assert (udon.student_head.out_features, udon.teacher_heads["a"].out_features) == (64, 256)


def test_without_teachers_the_student_is_the_same():
    with_teachers, without = small_udon(), small_udon(teacher_dim=0)
    without.load_state_dict(with_teachers.state_dict(), strict=False)
    x = images()
    with torch.no_grad():
        out, reference = without(x, "cars"), with_teachers(x, "cars")
    assert out.teacher is None and out.teacher_cosines is None
    for name in ("backbone", "student", "student_cosines"):
        assert torch.equal(getattr(out, name), getattr(reference, name)), name


@pytest.mark.parametrize(
    "dimensions", [dict(student_dim=FAN_IN), dict(teacher_dim=FAN_IN)], ids=["student", "teacher"]
)
def test_classifiers_start_lecun_uniform(dimensions):
    torch.manual_seed(0)
    udon = model.UDON(small_vit(), {"a": FAN_OUT}, **dimensions)
    classifier = (
        udon.student_classifiers["a"]
        if "student_dim" in dimensions
        else udon.teacher_classifiers["a"]
    )
    weight, bound = classifier.weight.detach().double(), (3 / FAN_IN) ** 0.5
    assert classifier.bias is None and weight.shape == (FAN_OUT, FAN_IN)
    assert 0.999 * bound < float(weight.abs().max()) <= bound * (1 + 1e-6)
    assert abs(float(weight.std()) * FAN_IN**0.5 - 1) < 0.01
    assert abs(float(weight.mean())) < 0.02 * bound
    for share in (0.1, 0.25, 0.5, 0.75):  # uniform: the quantiles of |w| are linear
        assert abs(float((weight.abs() < share * bound).double().mean()) - share) < 0.01, share


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_heads_start_lecun_normal(of):
    """A normal truncated at 2 standard deviations, scaled so that the truncated one has std sqrt(1 / fan_in)."""
    torch.manual_seed(0)
    udon = model.UDON(
        small_vit(width=FAN_IN, heads=4, depth=1),
        {"a": 2},
        student_dim=FAN_OUT,
        teacher_dim=FAN_OUT,
    )
    head = udon.student_head if of == "student" else udon.teacher_heads["a"]
    weight = head.weight.detach().double() * FAN_IN**0.5  # std 1 if right
    density_at_2, mass = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    shrink = math.sqrt(1 - 4 * density_at_2 / mass)  # std of a unit normal cut at +-2
    assert weight.shape == (FAN_OUT, FAN_IN) and not head.bias.any()
    assert abs(float(weight.std()) - 1) < 0.006, (
        f"std is {float(weight.std()):.4f} of sqrt(1 / fan_in)"
    )
    assert abs(float(weight.mean())) < 0.01
    assert 0.99 * 2 / shrink < float(weight.abs().max()) <= 2 / shrink * (1 + 1e-6), (
        "not cut at 2 std"
    )
    want = math.erf(1 / math.sqrt(2)) / mass  # share within 1 std before the cut
    assert abs(float((weight.abs() < 1 / shrink).double().mean()) - want) < 0.01


@pytest.mark.parametrize("layers", [2, 3])
def test_mlp_heads(layers):
    """Linear -> LayerNorm -> GELU -> ... -> Linear -> L2, from the equations in numpy; the last layer is never normalised."""
    torch.manual_seed(0)
    udon = model.UDON(
        model.ViT(16, 8, 24, 1, 2), {"cars": 4}, student_dim=6, teacher_dim=10, head_layers=layers
    ).double()
    x = torch.randn(5, 24, dtype=torch.float64)
    for head, width in ((udon.student_head, 6), (udon.teacher_heads["cars"], 10)):
        w = {name: p.detach().numpy() for name, p in head.named_parameters()}
        y = x.numpy()
        for i in range(layers):
            if i:
                y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
                y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
            y = y @ w[f"{3 * i}.weight"].T + w[f"{3 * i}.bias"]
        assert y.shape == (5, width)
        assert np.allclose(
            head(x).detach().numpy(), y / np.linalg.norm(y, axis=1, keepdims=True), atol=1e-12
        )
        assert len(w) == 2 * layers + 2 * (layers - 1)


def test_domains_start_from_different_weights():
    udon = model.UDON(small_vit(), {"a": 4, "b": 4})
    for modules in (udon.teacher_heads, udon.student_classifiers, udon.teacher_classifiers):
        assert not torch.equal(modules["a"].weight, modules["b"].weight)


# ---- UDON: gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("domain", CLASSES)
def test_only_the_active_domains_modules_get_gradients(domain):
    udon = randomised(small_udon())
    out = udon(images(), domain)
    (out.student_cosines[:, 0].sum() + out.teacher_cosines[:, 0].sum()).backward()
    for name, parameter in udon.named_parameters():
        if name.startswith(("backbone.", "student_head.")) or f".{domain}." in name:
            assert parameter.grad is not None and parameter.grad.any(), f"{name} has no gradient"
        else:
            assert parameter.grad is None, f"{name} of another domain has a gradient"


def test_each_path_reaches_its_own_modules_and_the_backbone():
    reached = {
        "student_cosines": ("backbone.", "student_head.", "student_classifiers.cars."),
        "teacher_cosines": ("backbone.", "teacher_heads.cars.", "teacher_classifiers.cars."),
    }
    for field, prefixes in reached.items():
        udon = randomised(small_udon())
        getattr(udon(images(), "cars"), field)[:, 0].sum().backward()
        with_gradient = {
            name
            for name, parameter in udon.named_parameters()
            if parameter.grad is not None and parameter.grad.any()
        }
        assert with_gradient == {
            name for name, _ in udon.named_parameters() if name.startswith(prefixes)
        }, field


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3), row=st.integers(0, 4))
def test_the_length_of_a_class_weight_does_not_matter(seed, scale, row):
    """Scaling one row changes no cosine, and so the gradient is at a right angle to every row."""
    torch.manual_seed(seed)
    classifier = model.CosineClassifier(9, 5).double()
    embeddings = F.normalize(torch.randn(7, 9, dtype=torch.float64), dim=1)
    before = classifier(embeddings)
    (torch.randn(7, 5, dtype=torch.float64) * before).sum().backward()
    gradient, weight = classifier.weight.grad, classifier.weight.detach()
    assert float(gradient.norm(dim=1).min()) > 1e-3, "no gradient to be at a right angle"
    assert (
        float((gradient * weight).sum(1).abs().max())
        < 1e-12 * float(gradient.norm() * weight.norm()) + 1e-15
    )
    with torch.no_grad():
        classifier.weight[row] *= scale
        assert torch.allclose(classifier(embeddings), before, rtol=0, atol=1e-12)


# ---- what UDON refuses ---------------------------------------------------------------------------


def test_an_unknown_domain_is_refused():
    with pytest.raises(ValueError) as caught:
        small_udon()(images(1), "boats")
    assert all(text in str(caught.value) for text in ("'boats'", *CLASSES))


@pytest.mark.parametrize(
    "name", ["a.b", ".", "keys", "items", "forward", "training", "_modules", ""]
)
def test_a_name_that_cannot_name_a_parameter_is_refused(name):
    with pytest.raises(ValueError) as caught:
        model.UDON(small_vit(), {"cars": 2, name: 3})
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("count", [0, -1])
def test_a_domain_without_a_class_is_refused(count):
    with pytest.raises(ValueError) as caught:
        model.UDON(small_vit(), {"cars": 2, "boats": count})
    assert "'boats'" in str(caught.value) and str(count) in str(caught.value)


@pytest.mark.parametrize("name", ["food2k", "met-art", "a b", "鳥", "0", "weight", "bias", "0/1"])
def test_other_names_are_kept_as_they_are(name):
    udon = model.UDON(small_vit(), {name: 2})
    assert f"teacher_heads.{name}.weight" in dict(udon.named_parameters())
    assert udon(images(1), name).student_cosines.shape == (1, 2)


# ---- copied alone --------------------------------------------------------------------------------


def test_the_file_works_alone_with_torch_only(tmp_path):
    source = Path(model.__file__).read_text()
    nodes = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    imported = {
        getattr(node, "module", alias.name).split(".")[0] for node in nodes for alias in node.names
    }
    assert imported - sys.stdlib_module_names == {"torch"}
    (tmp_path / "model.py").write_text(source)
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import model, torch\n"
        "udon = model.UDON(model.ViT(16, 8, 12, 1, 2), {'a': 3})\n"
        "print(model.__file__, tuple(udon(torch.ones(2, 3, 16, 16), 'a').teacher_cosines.shape))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout and "(2, 3)" in run.stdout
