"""model.py: the ViT against torch's encoder layers and timm's names and sizes; UDON's outputs
against NumPy; names, initial values and gradients of parameters; export; invalid input."""

import io
import math
import warnings

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
PUBLISHED = {  # size: width, depth, heads, millions of parameters without a classifier
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
FAN_IN, FAN_OUT = 512, 400  # large: the sampling error of a standard deviation is below 0.2 %


def small_vit(**changes):
    return model.ViT(**(SMALL | changes))


def small_udon(seed=0, classes=CLASSES, **changes):
    torch.manual_seed(seed)
    dimensions = dict(student_dim=STUDENT, teacher_dim=TEACHER) | changes
    return model.UDON(small_vit(), classes, **dimensions)


def images(batch=6, size=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator)


def shapes(module):
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def randomised(module, seed=2):
    """Makes every parameter random, so that a missing one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values / max(parameter[0].numel(), 4) ** 0.5)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return module


# ---- ViT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_norm", [False, True])
def test_parameters_have_timms_names_and_shapes(pre_norm):
    width, hidden = 48, 192
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden),
        "mlp.fc2.bias": (width,),
    }
    expected = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 17, width),
        "patch_embed.proj.weight": (width, 3, 8, 8),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    expected |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    if pre_norm:
        expected |= {"norm_pre.weight": (width,), "norm_pre.bias": (width,)}
    else:
        expected |= {"patch_embed.proj.bias": (width,)}
    vit = small_vit(pre_norm=pre_norm)
    assert shapes(vit) == expected
    assert set(vit.state_dict()) == set(expected), "a buffer, which timm's files do not have"


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_parameter_counts(size):
    width, depth, heads, millions = PUBLISHED[size]
    with torch.device("meta"):
        vit = model.ViT(**model.SIZES[size])
    count = sum(parameter.numel() for parameter in vit.parameters())
    block = 12 * width * width + 13 * width  # attention, MLP, two LayerNorms
    patches, tokens = (3 * 16 * 16 + 1) * width, (1 + 197) * width
    assert count == patches + tokens + depth * block + 2 * width
    assert round(count / 1e6, 2) == millions
    assert [block.attn.heads for block in vit.blocks] == [heads] * depth  # not part of the count


def test_default_is_b16():
    with torch.device("meta"):
        assert model.ViT().architecture == model.ViT(**model.SIZES["b16"]).architecture


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_closed_forms(name):
    x = np.linspace(-8, 8, 801)
    expected = np.array([ACTIVATIONS[name](value) for value in x])
    actual = model.ACTIVATIONS[name](torch.from_numpy(x)).numpy()
    assert np.abs(actual - expected).max() < 1e-12
    assert set(model.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_eps", [1e-6, 1e-2])
def test_forward_equals_torchs_encoder_layers(activation, pre_norm, norm_eps):
    """Unfolded patches and torch.nn.TransformerEncoderLayer are another implementation."""
    options = dict(activation=activation, norm_eps=norm_eps, pre_norm=pre_norm, mlp_ratio=3.0)
    vit = randomised(small_vit(**options)).double()
    w, width, x = vit.state_dict(), 48, images().double()
    kernel, bias = w["patch_embed.proj.weight"].flatten(1), w.get("patch_embed.proj.bias")
    patches = F.linear(F.unfold(x, 8, stride=8).transpose(1, 2), kernel, bias)  # (B, N, D)
    cls_tokens = w["cls_token"].repeat(x.shape[0], 1, 1)
    y = torch.cat([cls_tokens, patches], dim=1) + w["pos_embed"]
    if pre_norm:
        y = F.layer_norm(y, (width,), w["norm_pre.weight"], w["norm_pre.bias"], norm_eps)
    parts = ("norm1", "self_attn.in_proj", "self_attn.out_proj", "norm2", "linear1", "linear2")
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
        names = [f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")]
        names = [name.replace("in_proj.", "in_proj_") for name in names]
        weights = {name: w[f"blocks.{i}.{timm}"] for name, timm in zip(names, TIMM_BLOCK)}
        layer.load_state_dict(weights)
        with torch.no_grad():
            y = layer(y)
    expected = F.layer_norm(y, (width,), w["norm.weight"], w["norm.bias"], norm_eps)[:, 0]
    with torch.no_grad():
        actual = vit(x)
    assert actual.shape == (6, width)
    assert float((actual - expected).abs().max()) < 1e-10


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


def test_set_family_changes_everything_and_back():
    vit, x = randomised(small_vit()), images(2)
    bias = vit.patch_embed.proj.bias.detach().clone()
    with torch.no_grad():
        before = vit(x)
    vit.set_family("quick_gelu", 1e-5, True)
    fresh = small_vit(activation="quick_gelu", norm_eps=1e-5, pre_norm=True)
    assert shapes(vit) == shapes(fresh) and vit.architecture == fresh.architecture
    assert {m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    fresh.load_state_dict(vit.state_dict())
    with torch.no_grad():
        assert torch.equal(vit(x), fresh(x)) and not torch.equal(vit(x), before)
    vit.set_family("gelu_tanh", 1e-6, False)
    assert shapes(vit) == shapes(small_vit()) and vit.architecture == small_vit().architecture
    with torch.no_grad():
        vit.patch_embed.proj.bias.copy_(bias)  # pre_norm dropped it
        assert torch.equal(vit(x), before)


def test_images_of_a_batch_are_independent():
    vit, x = randomised(small_vit()).double(), images().double()
    with torch.no_grad():
        one_by_one = torch.cat([vit(x[i : i + 1]) for i in range(len(x))])
        assert torch.allclose(one_by_one, vit(x), rtol=0, atol=1e-12)


def test_initial_weights_of_the_vit():
    """As timm's for JAX: Xavier-uniform blocks, zero biases, position table of std 0.02."""
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


# ---- conv stem -----------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16, 32])
def test_conv_stem_gives_one_token_per_patch(patch_size):
    vit = model.ViT(2 * patch_size, patch_size, width=32, depth=1, heads=2, stem="conv")
    x = images(3, 2 * patch_size)
    assert vit.patch_embed(x).shape == (3, 4, 32)
    assert vit(x).shape == (3, 32)


def test_conv_stem_equals_its_equations():
    """3x3 convolutions of stride 2, each with a whole-image norm and a ReLU, then a 1x1 one."""
    torch.manual_seed(0)
    embed, x = small_vit(stem="conv").patch_embed, images()
    w = {name: parameter.detach().double() for name, parameter in embed.proj.named_parameters()}
    assert len(w) == 3 * 3 + 2  # three halvings for patches of 8

    def standardised(kernel):
        rows = kernel.flatten(1).numpy()
        rows = rows - rows.mean(1, keepdims=True)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return torch.from_numpy(rows).reshape(kernel.shape)

    y = x.double()
    for i in (0, 3, 6):
        y = F.conv2d(F.pad(y, (1, 1, 1, 1)), standardised(w[f"{i}.weight"]), stride=2)
        mean = y.mean((1, 2, 3), keepdim=True)
        variance = y.var((1, 2, 3), keepdim=True, correction=0)
        scale, shift = w[f"{i + 1}.weight"], w[f"{i + 1}.bias"]
        y = (y - mean) / (variance + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]
        y = y.clamp(min=0)
    kernel = standardised(w["9.weight"])[:, :, 0, 0]
    expected = torch.einsum("bchw,dc->bhwd", y, kernel) + w["9.bias"]
    with torch.no_grad():
        assert float((embed(x) - expected.flatten(1, 2)).abs().max()) < 1e-5


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_tokens_are_in_row_major_order(stem):
    """A change in one patch changes its token most.

    Convolutions of stride 2 with padding 1 are centred on the upper left quarter of the patch.
    """
    torch.manual_seed(0)
    embed, x = small_vit(stem=stem).patch_embed, images(1)
    for row, column in ((0, 0), (0, 3), (3, 0), (2, 1)):
        changed = x.clone()
        changed[:, :, 8 * row : 8 * row + 4, 8 * column : 8 * column + 4] *= -1  # same statistics
        with torch.no_grad():
            change = (embed(changed) - embed(x)).norm(dim=2)[0]
        assert int(change.argmax()) == 4 * row + column


@pytest.mark.parametrize("patch_size", [1, 6, 7, 12])
def test_conv_stem_needs_a_power_of_two(patch_size):
    with pytest.raises(ValueError, match=rf"(?s)\b{patch_size}\b.*power of 2"):
        small_vit(image_size=84, patch_size=patch_size, stem="conv")


@pytest.mark.parametrize("size", ["micro", "mini"])
def test_compact_sizes_are_compact(size):
    vit = model.ViT(**model.SIZES[size])
    assert vit(images(2, vit.architecture["image_size"])).shape == (2, vit.width)
    assert sum(parameter.numel() for parameter in vit.parameters()) < 2.5e6


# ---- invalid input of a ViT ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 24, 24), (2, 3, 32, 40), (2, 3, 64, 64), (2, 1, 32, 32), (2, 4, 32, 32), (3, 32, 32)],
    ids=str,
)
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError) as caught:
        small_vit()(torch.zeros(shape))
    assert str(shape) in str(caught.value) and "(B, 3, 32, 32)" in str(caught.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(heads=5), ["48", "5", "heads"]),
        (dict(patch_size=7), ["32", "7", "patch"]),
        (dict(activation="relu"), ["'relu'", "gelu_tanh"]),
        (dict(stem="mlp"), ["'mlp'", "'conv'"]),
        (dict(stem="conv", pre_norm=True), ["pre_norm", "'conv'"]),
    ],
    ids=str,
)
def test_invalid_options_are_named(changes, words):
    with pytest.raises(ValueError) as caught:
        small_vit(**changes)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "family",
    [("relu", 1e-5, True), ("gelu", 1e-5, True)],
    ids=["activation", "pre_norm with a conv stem"],
)
def test_a_refused_family_changes_nothing(family):
    vit = small_vit(stem="conv")
    before, architecture = shapes(vit), dict(vit.architecture)
    with pytest.raises(ValueError):
        vit.set_family(*family)
    assert shapes(vit) == before and vit.architecture == architecture
    assert {m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.activation for m in vit.modules() if isinstance(m, model.Mlp)} == {"gelu_tanh"}


# ---- outputs -------------------------------------------------------------------------------------


def test_outputs_have_the_documented_fields_shapes_and_ranges():
    udon, x = small_udon(), images()
    for domain, count in CLASSES.items():
        out = udon(x, domain)._asdict()
        assert {name: tuple(tensor.shape) for name, tensor in out.items()} == {
            "backbone": (6, 48),
            "student": (6, STUDENT),
            "teacher": (6, TEACHER),
            "student_cosines": (6, count),
            "teacher_cosines": (6, count),
        }
        for name in ("backbone", "student", "teacher"):
            assert torch.allclose(out[name].norm(dim=1), torch.ones(6), atol=1e-6), name
        for name in ("student_cosines", "teacher_cosines"):
            assert float(out[name].detach().abs().max()) <= 1 + 1e-6, name


def test_outputs_equal_the_equations_in_numpy():
    udon, x = randomised(small_udon()), images()
    w = {name: parameter.detach().double().numpy() for name, parameter in udon.named_parameters()}

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def head(name, rows):
        return unit(rows @ w[f"{name}.weight"].T + w[f"{name}.bias"])

    with torch.no_grad():
        backbone = unit(udon.backbone(x).double().numpy())
    for domain in CLASSES:
        student, teacher = head("student_head", backbone), head(f"teacher_heads.{domain}", backbone)
        expected = model.Outputs(
            backbone,
            student,
            teacher,
            student @ unit(w[f"student_classifiers.{domain}.weight"]).T,
            teacher @ unit(w[f"teacher_classifiers.{domain}.weight"]).T,
        )
        with torch.no_grad():
            actual = udon(x, domain)
        for name in model.Outputs._fields:
            error = np.abs(getattr(actual, name).numpy() - getattr(expected, name)).max()
            assert error < 2e-6, f"{domain}: {name}"


def test_embed_returns_the_student_embedding():
    udon, x = small_udon(), images()
    with torch.no_grad():
        for domain in CLASSES:
            assert torch.equal(udon.embed(x), udon(x, domain).student)
            assert torch.equal(udon.embed_backbone(x), udon(x, domain).backbone)


def test_scaling_a_head_changes_nothing():
    udon, x = randomised(small_udon()), images()
    with torch.no_grad():
        before = udon(x, "cars")
        for head in (udon.student_head, udon.teacher_heads["cars"]):
            head.weight.mul_(5)
            head.bias.mul_(5)
        after = udon(x, "cars")
    for name, first, second in zip(model.Outputs._fields, before, after):
        assert torch.allclose(first, second, atol=1e-6), name


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher_dim", [TEACHER, 0])
def test_parameters_are_named_by_role_and_domain(teacher_dim):
    expected = {f"backbone.{name}": shape for name, shape in shapes(small_vit()).items()}
    expected |= {"student_head.weight": (STUDENT, 48), "student_head.bias": (STUDENT,)}
    for domain, count in CLASSES.items():
        expected[f"student_classifiers.{domain}.weight"] = (count, STUDENT)
        if teacher_dim:
            expected[f"teacher_heads.{domain}.weight"] = (teacher_dim, 48)
            expected[f"teacher_heads.{domain}.bias"] = (teacher_dim,)
            expected[f"teacher_classifiers.{domain}.weight"] = (count, teacher_dim)
    udon = small_udon(teacher_dim=teacher_dim)
    assert shapes(udon) == expected
    assert set(udon.state_dict()) == set(expected)


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


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_classifiers_start_lecun_uniform(role):
    torch.manual_seed(0)
    udon = model.UDON(small_vit(), {"a": FAN_OUT}, **{f"{role}_dim": FAN_IN})
    classifier = getattr(udon, f"{role}_classifiers")["a"]
    weight, bound = classifier.weight.detach().double(), (3 / FAN_IN) ** 0.5
    assert classifier.bias is None and weight.shape == (FAN_OUT, FAN_IN)
    assert 0.999 * bound < float(weight.abs().max()) <= bound * (1 + 1e-6)
    assert abs(float(weight.std()) * FAN_IN**0.5 - 1) < 0.01
    assert abs(float(weight.mean())) < 0.02 * bound
    for share in (0.1, 0.25, 0.5, 0.75):  # the quantiles of |w| are linear
        assert abs(float((weight.abs() < share * bound).double().mean()) - share) < 0.01, share


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_heads_start_lecun_normal(role):
    """Truncated at 2 standard deviations, and scaled to a std of sqrt(1 / fan_in) after that."""
    torch.manual_seed(0)
    vit = small_vit(width=FAN_IN, heads=4, depth=1)
    udon = model.UDON(vit, {"a": 2}, student_dim=FAN_OUT, teacher_dim=FAN_OUT)
    head = udon.student_head if role == "student" else udon.teacher_heads["a"]
    weight = head.weight.detach().double() * FAN_IN**0.5  # should have std 1
    density_at_2, mass = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    truncated_std = math.sqrt(1 - 4 * density_at_2 / mass)  # of a unit normal within +-2
    assert weight.shape == (FAN_OUT, FAN_IN) and not head.bias.any()
    assert abs(float(weight.std()) - 1) < 0.006
    assert abs(float(weight.mean())) < 0.01
    assert 0.99 * 2 / truncated_std < float(weight.abs().max()) <= 2 / truncated_std * (1 + 1e-6)
    expected = math.erf(1 / math.sqrt(2)) / mass  # share within 1 std of the untruncated normal
    share = float((weight.abs() < 1 / truncated_std).double().mean())
    assert abs(share - expected) < 0.01


@pytest.mark.parametrize("layers", [2, 3])
def test_mlp_heads_equal_their_equations(layers):
    """LayerNorm and GELU only between the linear layers, then L2."""
    torch.manual_seed(0)
    vit, dimensions = model.ViT(16, 8, 24, 1, 2), dict(student_dim=6, teacher_dim=10)
    udon = model.UDON(vit, {"cars": 4}, **dimensions, head_layers=layers).double()
    x = torch.randn(5, 24, dtype=torch.float64)
    for head, width in ((udon.student_head, 6), (udon.teacher_heads["cars"], 10)):
        w = {name: parameter.detach().numpy() for name, parameter in head.named_parameters()}
        y = x.numpy()
        for i in range(layers):
            if i:
                y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
                y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
            y = y @ w[f"{3 * i}.weight"].T + w[f"{3 * i}.bias"]
        expected = y / np.linalg.norm(y, axis=1, keepdims=True)
        assert y.shape == (5, width)
        assert np.allclose(head(x).detach().numpy(), expected, atol=1e-12)
        assert len(w) == 2 * layers + 2 * (layers - 1)


def test_domains_start_from_different_weights():
    udon = model.UDON(small_vit(), {"a": 4, "b": 4})
    for modules in (udon.teacher_heads, udon.student_classifiers, udon.teacher_classifiers):
        assert not torch.equal(modules["a"].weight, modules["b"].weight)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", CLASSES)
def test_only_modules_of_the_active_domain_receive_gradients(domain):
    udon = randomised(small_udon())
    out = udon(images(), domain)
    (out.student_cosines[:, 0].sum() + out.teacher_cosines[:, 0].sum()).backward()
    for name, parameter in udon.named_parameters():
        if name.startswith(("backbone.", "student_head.")) or f".{domain}." in name:
            assert parameter.grad is not None and parameter.grad.any(), f"{name} has no gradient"
        else:
            assert parameter.grad is None, f"{name} of another domain has a gradient"


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_cosines_train_their_own_path_and_the_backbone(role):
    prefixes = {
        "student": ("backbone.", "student_head.", "student_classifiers.cars."),
        "teacher": ("backbone.", "teacher_heads.cars.", "teacher_classifiers.cars."),
    }[role]
    udon = randomised(small_udon())
    getattr(udon(images(), "cars"), f"{role}_cosines")[:, 0].sum().backward()
    for name, parameter in udon.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.any())
        assert trained == name.startswith(prefixes), name


@settings(max_examples=25)
@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3), row=st.integers(0, 4))
def test_the_norm_of_a_class_weight_has_no_effect(seed, scale, row):
    """Scaling a row changes no cosine, so the gradient is orthogonal to every row."""
    torch.manual_seed(seed)
    classifier = model.CosineClassifier(9, 5).double()
    embeddings = F.normalize(torch.randn(7, 9, dtype=torch.float64), dim=1)
    before = classifier(embeddings)
    (torch.randn(7, 5, dtype=torch.float64) * before).sum().backward()
    gradient, weight = classifier.weight.grad, classifier.weight.detach()
    assert float(gradient.norm(dim=1).min()) > 1e-3
    products = (gradient * weight).sum(1).abs()
    assert float(products.max()) < 1e-12 * float(gradient.norm() * weight.norm()) + 1e-15
    with torch.no_grad():
        classifier.weight[row] *= scale
        assert torch.allclose(classifier(embeddings), before, rtol=0, atol=1e-12)


# ---- export and tracing --------------------------------------------------------------------------


class Embed(nn.Module):
    """UDON.embed as a module."""

    def __init__(self, udon):
        super().__init__()
        self.udon = udon

    def forward(self, images):
        return self.udon.embed(images)


def embed_module(**changes):
    udon = model.UDON(small_vit(depth=1, **changes), {"cars": 5, "a.b": 2}, teacher_dim=8)
    return Embed(udon)


def exported(module, x):
    batch = torch.export.Dim("batch")
    return torch.export.export(module, (x,), dynamic_shapes=({0: batch},)).module()


def traced(module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check of the image size becomes a constant
        return torch.jit.trace(module, x)


def through_onnx(module, x):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime, file = pytest.importorskip("onnxruntime"), io.BytesIO()
    dynamic_shapes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), file, dynamic_shapes=dynamic_shapes, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize(
    "module, export",
    [
        (small_vit(depth=1), exported),
        (small_vit(depth=1), traced),
        (embed_module(stem="conv"), exported),
        (embed_module(stem="conv"), traced),
        (embed_module(pre_norm=True), traced),
        (embed_module(), through_onnx),
    ],
    ids=["ViT-export", "ViT-trace", "conv-export", "conv-trace", "CLIP-trace", "ONNX"],
)
def test_an_exported_model_takes_any_batch_size(module, export):
    module = randomised(module).eval()
    run = export(module, images(3))
    for batch in (1, 3, 7):
        x = images(batch, seed=batch)
        with torch.no_grad():
            assert torch.allclose(run(x), module(x), atol=2e-5), batch


# ---- domain names --------------------------------------------------------------------------------

ORDINARY = ["food2k", "met-art", "a b", "鳥", "0", "weight", "bias", "0/1", "100%", "%2E", "a@b"]
ESCAPED = ["a.b", ".", "..", "a%2Eb.c", "keys", "items", "forward", "training", "pop", "_modules"]
ESCAPED += ["__class__", "__dict__", "__no_such_name__", "@", "@keys", "@a%2Eb", "@@"]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_domain_names_are_parameter_names(name):
    udon = model.UDON(small_vit(), {name: 2})
    assert f"teacher_heads.{name}.weight" in dict(udon.named_parameters())


def test_any_domain_name_works():
    names = ORDINARY + ESCAPED
    udon = small_udon(classes={name: 1 + number for number, name in enumerate(names)})
    for modules in (udon.student_classifiers, udon.teacher_heads, udon.teacher_classifiers):
        assert len(modules) == len(names)
        assert list(modules) == list(modules.keys()) == [name for name, _ in modules.items()]
        assert list(modules) == names
        for name, module in modules.items():
            assert name in modules and modules[name] is module
        assert "boats" not in modules and None not in modules
    for number, name in enumerate(names):
        assert udon(images(1), name).student_cosines.shape == (1, 1 + number)
    classes = {name: c.out_features for name, c in udon.student_classifiers.items()}
    copied = small_udon(seed=1, classes=classes)
    copied.load_state_dict(udon.state_dict())
    for name in names:
        weight = udon.student_classifiers[name].weight
        assert torch.equal(copied.student_classifiers[name].weight, weight)


@settings(max_examples=50)
@given(st.lists(st.text(st.sampled_from("@%.2E5keysa_"), min_size=1), unique=True))
def test_domain_names_never_collide(names):
    modules = model.DomainModules({name: nn.Identity() for name in names})
    assert list(modules) == names
    for name in names:
        del modules[name]
    assert len(modules) == 0 and not set(modules)


# ---- invalid input of UDON -----------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["boats", "", None, "student_head"])
def test_an_unknown_domain_is_refused(domain):
    with pytest.raises(ValueError) as caught:
        small_udon()(images(1), domain)
    assert all(text in str(caught.value) for text in (repr(domain), *CLASSES))


@pytest.mark.parametrize("name, count", [("boats", 0), ("boats", -1), ("", 3)])
def test_invalid_domains_are_named(name, count):
    with pytest.raises(ValueError) as caught:
        model.UDON(small_vit(), {"cars": 2, name: count})
    assert repr(name) in str(caught.value) and str(count) in str(caught.value)


# ---- memory of large layers ----------------------------------------------------------------------


def saved_bytes(module, x):
    """-> the bytes of the tensors that the backward pass keeps, and the output."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)
    return sum(storages.values()), output


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_large_layer_keeps_less_and_has_the_same_gradients(activation, monkeypatch):
    torch.manual_seed(0)
    mlp = model.Mlp(16, 64, activation).double()
    found = []
    for large in (1 << 19, 0):
        monkeypatch.setattr(model, "LARGE", large)
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).double()
        x.requires_grad_()
        kept, output = saved_bytes(mlp, x)
        mlp.zero_grad()
        (output * torch.arange(16)).sum().backward()
        gradients = [x.grad, *(parameter.grad.clone() for parameter in mlp.parameters())]
        found.append((kept, output.detach(), gradients))
    (plain, expected, gradients), (kept, output, others) = found
    assert kept <= plain - 3 * 5 * 64 * 8  # the activated layer
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    torch.testing.assert_close(others, gradients, rtol=1e-12, atol=1e-14)


def test_a_large_layer_trains_in_bfloat16(monkeypatch):
    monkeypatch.setattr(model, "LARGE", 0)
    mlp = model.Mlp(16, 64, "gelu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = mlp(torch.randn(3, 5, 16))
    output.float().square().mean().backward()
    assert all(one.grad.dtype == torch.float32 for one in mlp.parameters())


def test_a_frozen_large_layer_passes_the_gradient_on(monkeypatch):
    monkeypatch.setattr(model, "LARGE", 0)
    mlp = model.Mlp(16, 64, "gelu").requires_grad_(False)
    x = torch.randn(3, 5, 16, requires_grad=True)
    mlp(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(one.grad is None for one in mlp.parameters())
