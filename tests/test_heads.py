"""heads.py: what heads and classifiers start from."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import evaluate
import heads
import run
from config import Config, ConfigError
from model import UDON

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "antialias": True}
OPTIONS = dict(preset="micro", init="scratch", image_size=32, out="x", device="cpu", batch_size=4)
DOMAINS = ("birds", "cars")


@pytest.fixture(scope="module")
def splits(uned):
    return {domain: data.Benchmark(uned).split(domain, "train") for domain in DOMAINS}


@pytest.fixture(scope="module")
def random_model(splits):
    return run.build_run(Config(**OPTIONS, period=4, student_init="lecun"), splits).model.eval()


def started(splits, start="pca", **options):
    config = Config(**OPTIONS, period=4, student_init=start, **options)
    return run.build_run(config, splits).model.eval()


def embedded(model, splits) -> dict[str, np.ndarray]:
    """The backbone's embeddings (N, D) of all training images, which are few here, in float64."""
    images = {domain: data.TestImages(split, 32) for domain, split in splits.items()}
    return {
        domain: evaluate.embed(model.embed_backbone, one, HALF, "cpu").double().numpy()
        for domain, one in images.items()
    }


def weights(module):
    return module.weight.detach().double().numpy()


def assert_principal_axes(weight, covariance, count):
    """That the first `count` rows are numpy's axes up to their sign, and all are orthonormal."""
    values, axes = np.linalg.eigh(covariance)
    for row, axis in zip(weight, axes.T[np.argsort(values)[::-1][:count]]):
        assert abs(abs(row @ axis) - 1) < 1e-3
    np.testing.assert_allclose(weight @ weight.T, np.eye(len(weight)), atol=1e-5)


def test_the_student_head_holds_the_principal_axes_of_all_domains(splits):
    model = started(splits)
    rows = embedded(model, splits)
    shares = [np.full(len(one), 1 / len(one) / len(rows)) for one in rows.values()]
    together, shares = np.concatenate(list(rows.values())), np.concatenate(shares)
    mean = shares @ together
    covariance = (shares[:, None] * (together - mean)).T @ (together - mean)
    weight = weights(model.student_head)
    assert_principal_axes(weight, covariance, 30)  # of fewer images than dimensions
    bias = model.student_head.bias.detach().numpy()
    np.testing.assert_allclose(bias, -weight @ mean, atol=1e-5)


def test_a_narrow_teacher_head_holds_the_axes_of_its_domain(splits):
    model = started(splits, teacher_dim=12)
    for domain, rows in embedded(model, splits).items():
        weight = weights(model.teacher_heads[domain])
        assert_principal_axes(weight, np.cov(rows.T), 12)
        bias = model.teacher_heads[domain].bias.detach().numpy()
        np.testing.assert_allclose(bias, -weight @ rows.mean(0), atol=1e-5)


def test_a_head_wider_than_the_backbone_keeps_all_angles(splits):
    """96 outputs of the backbone, 256 of a teacher: cosines as of the centred rows."""
    model = started(splits)
    for domain, rows in embedded(model, splits).items():
        centred = rows - rows.mean(0)
        centred /= np.linalg.norm(centred, axis=1, keepdims=True)
        with torch.no_grad():
            teacher = model.teacher_heads[domain](torch.from_numpy(rows).float()).numpy()
        np.testing.assert_allclose(teacher @ teacher.T, centred @ centred.T, atol=1e-3)


def shrunk(rows, weights):
    """Ledoit and Wolf's estimate, row by row. rows: (N, D), weights: (N,)."""
    outer = [np.outer(row, row) for row in rows]
    covariance = sum(w * one for w, one in zip(weights, outer))
    target = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    error = sum(w**2 * ((one - covariance) ** 2).sum() for w, one in zip(weights, outer))
    share = min(1, error / ((covariance - target) ** 2).sum())
    return (1 - share) * covariance + share * target


def inverse_root(matrix):
    """The symmetric root of the inverse, with rows of mean square norm 1."""
    values, axes = np.linalg.eigh(matrix)
    root = (axes / np.sqrt(values)) @ axes.T
    return root / np.sqrt((root**2).sum() / len(root))


def residuals(rows, classes):
    return rows - np.stack([rows[classes == c].mean(0) for c in classes])


def assert_same_up_to_sign(weight, expected):
    signs = np.sign((weight * expected).sum(1, keepdims=True))
    np.testing.assert_allclose(weight * signs, expected, atol=2e-3)


def test_lda_whitens_with_the_covariance_within_the_classes_of_all_domains(splits):
    model = started(splits, "lda", student_dim=8)
    rows = embedded(model, splits)
    within, weights_, means, covariances = [], [], [], []
    for domain, one in rows.items():
        within.append(residuals(one, splits[domain].classes))
        weights_.append(np.full(len(one), 1 / len(one) / len(rows)))
        means.append(one.mean(0))
        covariances.append(np.cov(one.T, bias=True))
    covariance = np.mean(covariances, 0) + np.cov(np.stack(means).T, bias=True)
    whitener = inverse_root(shrunk(np.concatenate(within), np.concatenate(weights_)))
    values, axes = np.linalg.eigh(whitener @ covariance @ whitener)
    expected = axes[:, ::-1][:, :8].T @ whitener
    weight = weights(model.student_head)
    assert_same_up_to_sign(weight, expected)
    bias = model.student_head.bias.detach().numpy()
    np.testing.assert_allclose(bias, -weight @ np.mean(means, 0), atol=1e-5)


def test_a_wide_teacher_head_of_lda_keeps_the_angles_of_whitened_embeddings(splits):
    model = started(splits, "lda")
    for domain, rows in embedded(model, splits).items():
        within = residuals(rows, splits[domain].classes)
        whitener = inverse_root(shrunk(within, np.full(len(rows), 1 / len(rows))))
        expected = (rows - rows.mean(0)) @ whitener
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        with torch.no_grad():
            teacher = model.teacher_heads[domain](torch.from_numpy(rows).float()).numpy()
        np.testing.assert_allclose(teacher @ teacher.T, expected @ expected.T, atol=2e-3)


def test_lda_is_pca_where_each_class_has_one_image(random_model):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    classes = np.arange(12, dtype=np.int32)
    heads_of = {}
    for start in ("pca", "lda"):
        model = UDON(
            copy.deepcopy(random_model.backbone), {"one": 12}, student_dim=4, teacher_dim=8
        )
        split = data.Split("one", "train", classes, pixels=pixels)
        heads.start_from_images(model, {"one": split}, 32, HALF, start=start)
        heads_of[start] = model.state_dict()
    for name, value in heads_of["pca"].items():
        if "backbone" not in name and "student" in name.split(".")[0]:
            assert torch.equal(value, heads_of["lda"][name]), name


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 8), st.floats(0, 3))
def test_a_shrunk_covariance_is_ledoit_and_wolfs(seed, count, width, skew):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, width)) * np.exp(skew * rng.normal(size=width))
    shares = rng.uniform(0.1, 1, count)
    shares /= shares.sum()
    rows /= np.sqrt(shares @ (rows**2).sum(1))  # trace 1, which tolerances refer to
    result = heads.shrunk_covariance(torch.from_numpy(rows), torch.from_numpy(shares)).numpy()
    if width > 1:
        np.testing.assert_allclose(result, shrunk(rows, shares), rtol=1e-8, atol=1e-12)
    plain = rows.T @ (shares[:, None] * rows)
    np.testing.assert_allclose(np.trace(result), np.trace(plain))
    assert np.linalg.eigvalsh(result)[0] >= np.linalg.eigvalsh(plain)[0] * (1 - 1e-9) - 1e-12


def test_the_same_rows_more_often_are_shrunk_less():
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).double()
    rows *= torch.arange(1, 7)
    plain = rows.T @ rows / 30
    errors = []
    for copies in (1, 3, 10):
        many = rows.repeat(copies, 1)
        weights = torch.full((len(many),), 1 / len(many)).double()
        errors.append((heads.shrunk_covariance(many, weights) - plain).norm().item())
    assert errors[0] > errors[1] > errors[2] > 0


def test_rows_of_zero_have_the_covariance_zero_and_are_not_whitened():
    rows, weights = torch.zeros(3, 4).double(), torch.full((3,), 1 / 3).double()
    assert heads.shrunk_covariance(rows, weights).eq(0).all()
    assert torch.equal(heads.whitening(rows, weights), torch.eye(4).double())


@pytest.mark.parametrize("start", ["pca", "lda"])
def test_a_class_starts_at_the_mean_of_its_images(splits, start):
    model = started(splits, start)
    for domain, rows in embedded(model, splits).items():
        classes = splits[domain].classes
        means = np.stack([rows[classes == c].mean(0) for c in range(classes.max() + 1)])
        for head, classifier in (
            (model.student_head, model.student_classifiers[domain]),
            (model.teacher_heads[domain], model.teacher_classifiers[domain]),
        ):
            with torch.no_grad():
                expected = head(torch.from_numpy(means).float()).numpy()
            np.testing.assert_allclose(weights(classifier), expected, atol=1e-4)


def test_a_class_that_is_a_whole_domain_keeps_its_random_weights(random_model):
    """Its mean is the mean of the domain, whose embedding has no direction; so has a class without
    images that can be read. The model is in float64."""
    pixels = np.full((4, 32, 32, 3), 200, dtype=np.uint8)
    model = UDON(copy.deepcopy(random_model.backbone), {"flat": 2}, student_dim=4, teacher_dim=128)
    model.double().backbone.register_forward_pre_hook(lambda _, images: images[0].double())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split = data.Split("flat", "train", np.array([0, 0, 0, 1], dtype=np.int32), pixels=pixels)
    split.bad_rows[3] = "unreadable"
    heads.start_from_images(model, {"flat": split}, 32, HALF)
    for role in ("student", "teacher"):
        weight = getattr(model, f"{role}_classifiers")["flat"].weight
        assert torch.equal(weight[1], before[f"{role}_classifiers.flat.weight"][1])
        assert weight.isfinite().all() and (weight.norm(dim=1) > 0.1).all()


def test_modules_that_another_run_filled_stay_as_they_are(splits, random_model):
    before = {name: value.clone() for name, value in random_model.state_dict().items()}
    filled = ["student_head", "teacher_heads.birds", "student_classifiers.birds"]
    heads.start_from_images(random_model, splits, 32, HALF, filled)
    after = random_model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    random_model.load_state_dict(before)
    kept = {n for n in before if n.startswith(("backbone.", *(f"{name}." for name in filled)))}
    assert same == kept


def test_the_start_is_a_function_of_the_seed(splits):
    one, again, other = (started(splits, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["teacher_heads.cars.weight"], other["teacher_heads.cars.weight"])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=300))
def test_at_most_twenty_images_of_each_class(classes):
    classes = np.unique(classes, return_inverse=True)[1].astype(np.int64)
    rows = heads.images_of_each_class(classes)
    assert (np.diff(rows) > 0).all()
    counts = np.bincount(classes)
    np.testing.assert_array_equal(np.bincount(classes[rows]), np.minimum(counts, 20))
    for c in np.unique(classes):  # spread over the class: no gap is twice another
        places = np.flatnonzero(np.isin(np.flatnonzero(classes == c), rows))
        gaps = np.diff([-1, *places])
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("model", ["micro", "mini"])
def test_the_compact_presets_start_from_images_and_the_published_setting_does_not(model):
    assert Config(preset=model).student_init == "pca"
    assert Config().student_init == Config(preset="uned-b16").student_init == "lecun"


def test_several_layers_cannot_start_from_images():
    with pytest.raises(ConfigError, match="--head-layers 2, .* use --head-layers 1 or"):
        Config(preset="mini", head_layers=2)
