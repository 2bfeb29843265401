"""What the heads and classifiers of a run start from, besides random numbers.

    continue_heads(model, path, splits)      those of another run that fit (--init RUN)
    start_from_images(model, splits, ...)    the training images (--student-init pca, lda)

Copy with: data, folders, images, procedural, evaluate, export, metrics, vectors, gallery,
checkpoint, model, timm_backbone, distributed, kernels, torch, numpy, pillow.
"""

from collections.abc import Container
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import checkpoint
import data
import evaluate
from model import UDON

CLASS_IMAGES = 20  # of each class, at most, that a start is computed from


def continue_heads(model: UDON, path: str | Path, splits: dict[str, data.Split]) -> list[str]:
    """Fills the heads and classifiers that a checkpoint has, too, and says which -> the names of
    their modules.

    The student head and the teacher heads of the same domains are filled where their sizes are
    equal, the classifiers where the domain has the same classes in the same order.
    """
    contents = checkpoint.read(path)
    names, filled = contents.get("class_names", {}), []
    known = {domain for domain in splits if names.get(domain) == splits[domain].class_names}
    groups = {"the student head": {"": model.student_head}, "teacher heads": model.teacher_heads}
    for role in ("student", "teacher"):
        classifiers = getattr(model, f"{role}_classifiers").items()
        groups[f"{role} classifiers"] = {d: module for d, module in classifiers if d in known}
    prefixes = {module: name for name, module in model.named_modules()}
    texts = ["the backbone"]
    for group, modules in groups.items():
        domains = []
        for domain, module in modules.items():
            own = module.state_dict()
            saved = {key: contents["model"].get(f"{prefixes[module]}.{key}") for key in own}
            if all(saved[key] is not None and saved[key].shape == own[key].shape for key in own):
                module.load_state_dict(saved)
                filled.append(prefixes[module])
                domains.append(domain)
        if domains:
            texts.append(f"{group} of {', '.join(domains)}" if domains[0] else group)
    print(f"from {path}: {'; '.join(texts)}; all else is new")
    return filled


class Moments(NamedTuple):
    """Of the backbone's embeddings (N, D) of training images, in float64."""

    mean: torch.Tensor  # (D,)
    covariance: torch.Tensor  # (D, D)
    residuals: torch.Tensor  # (N, D): embeddings less the mean of their class
    weights: torch.Tensor  # (N,): what each residual counts, sum 1


@torch.no_grad()
def start_from_images(
    model: UDON,
    splits: dict[str, data.Split],
    size: int,
    preprocessing: dict,
    filled: Container[str] = (),
    seed: int = 0,
    start: Literal["pca", "lda"] = "pca",
) -> None:
    """Sets heads and classifiers from the training images, so that the gradients of random heads do
    not destroy what the backbone already tells apart.

    pca: the student head becomes x -> W (x - mean), with the first principal axes of the backbone's
    embeddings of training images, each domain with the same weight, in the rows of W. A teacher
    head becomes the same for the images of its domain. A head that is wider than the backbone gets
    a random W with orthonormal columns, which keeps the angles of embeddings less their mean.
    lda: the same of embeddings that are whitened first, with the covariance within classes: what
    varies between images of a class counts less, as in linear discriminant analysis.
    Either way, the weights of a class become the embedding of the mean of its images (weight
    imprinting, arXiv:1712.07136).

    splits   {domain: training images}, of `size` pixels; at most 20 images of a class are used
    filled   the names of modules that stay as they are
    seed     of the random W
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    moments, centres = {}, {}
    for domain, split in splits.items():
        moments[domain], centres[domain] = moments_of(model, split, size, preprocessing, device)
    count = sum(len(one.weights) for one in moments.values())

    names = {module: name for name, module in model.named_modules()}

    def start_head(head, one: Moments):
        if names[head] not in filled:
            whitener = torch.eye(len(one.mean), dtype=torch.float64)
            if start == "lda":
                whitener = whitening(one.residuals, one.weights)
            axes = projection(whitener @ one.covariance @ whitener, head.out_features, generator)
            head.weight.copy_(axes @ whitener)
            head.bias.copy_(-axes @ whitener @ one.mean)

    def start_classes(classifier, head, domain):
        if names[classifier] not in filled:
            targets = head(centres[domain].to(head.weight))
            known = targets.norm(dim=1) > 0.5  # not NaN, nor the 0 of a class at the domain's mean
            classifier.weight[known] = targets[known]

    start_head(model.student_head, pooled(list(moments.values())))
    for domain in splits:
        start_classes(model.student_classifiers[domain], model.student_head, domain)
        if model.teacher_heads:
            start_head(model.teacher_heads[domain], moments[domain])
            start_classes(model.teacher_classifiers[domain], model.teacher_heads[domain], domain)
    print(f"heads and classifiers start from {count:,} training images")


def moments_of(
    model: UDON, split: data.Split, size: int, preprocessing: dict, device: torch.device
) -> tuple[Moments, torch.Tensor]:
    """The moments of at most 20 images of each class, and the means (C, D) of the classes."""
    some = images_of_each_class(split.classes)
    images = data.TestImages(split, size, rows=some, **data.resizing(preprocessing))
    rows = evaluate.embed(model.embed_backbone, images, preprocessing, device).double()
    usable = images.usable_rows()
    rows, classes = rows[np.searchsorted(some, usable)], split.classes[usable]
    centres = class_means(rows, classes, split.num_classes)
    residuals = rows - centres[torch.from_numpy(classes)]
    weights = torch.full_like(rows[:, 0], 1 / len(rows))
    covariance = torch.cov(rows.T, correction=0)
    return Moments(rows.mean(0), covariance, residuals, weights), centres


def pooled(domains: list[Moments]) -> Moments:
    """The moments of the images of several domains, each with the same weight."""
    means, covariances, residuals, weights = zip(*domains)
    means = torch.stack(means)
    covariance = torch.stack(covariances).mean(0) + torch.cov(means.T, correction=0)
    return Moments(
        means.mean(0), covariance, torch.cat(residuals), torch.cat(weights) / len(domains)
    )


def whitening(residuals: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(D, D): the symmetric W, with rows of mean square norm 1, such that the covariance within
    classes of x -> W x is a multiple of the identity; the identity where classes do not vary.

    The covariance of the residuals (N, D) is shrunk: few images tell little about its small
    eigenvalues, which a root of its inverse would enlarge.
    """
    covariance = shrunk_covariance(residuals, weights)
    if covariance.trace() == 0:
        return torch.eye(len(covariance)).to(covariance)
    values, axes = torch.linalg.eigh(covariance)
    root = axes * values.rsqrt() @ axes.T
    return root * (len(root) / root.square().sum()).sqrt()


def shrunk_covariance(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(D, D): the covariance of rows (N, D) of mean 0, moved towards a multiple of the identity.
    How far is the estimate of Ledoit and Wolf (2004, https://doi.org/10.1016/S0047-259X(03)00096-4)
    of what is best: the farther, the fewer the rows. weights: (N,), sum 1."""
    covariance = rows.T @ (weights[:, None] * rows)
    target = covariance.trace() / len(covariance) * torch.eye(len(covariance)).to(covariance)
    deviations = (  # |row rowᵀ - covariance|², (N,)
        rows.square().sum(1).square()
        - 2 * (rows @ covariance * rows).sum(1)
        + covariance.square().sum()
    )
    error = (weights.square() * deviations).sum()
    share = (error / (covariance - target).square().sum()).nan_to_num(1.0).clamp(0, 1)
    return covariance.lerp(target, share)


def images_of_each_class(classes: np.ndarray) -> np.ndarray:
    """The rows of at most CLASS_IMAGES images of each class, spread evenly over its rows, in
    ascending order. classes: (N,) in 0..C-1."""
    order = np.argsort(classes, kind="stable")
    counts = np.bincount(classes)
    firsts = np.cumsum(counts) - counts
    ranks = np.arange(len(classes)) - firsts[classes[order]]  # within the class
    counts = counts[classes[order]]
    kept = np.minimum(counts, CLASS_IMAGES)
    return np.sort(order[(ranks + 1) * kept // counts > ranks * kept // counts])


def class_means(rows: torch.Tensor, classes: np.ndarray, count: int) -> torch.Tensor:
    """(count, D): the mean of the rows (N, D) of each class; NaN for a class without rows."""
    classes = torch.from_numpy(classes)
    sums = torch.zeros(count, rows.shape[1], dtype=rows.dtype).index_add_(0, classes, rows)
    return sums / classes.bincount(minlength=count)[:, None]


def projection(covariance: torch.Tensor, width: int, generator: torch.Generator) -> torch.Tensor:
    """(width, D): the first principal axes, unit rows, or, where width exceeds D, random
    orthonormal columns. covariance: (D, D)."""
    if width > len(covariance):
        empty = torch.empty(width, len(covariance), dtype=covariance.dtype)
        return torch.nn.init.orthogonal_(empty, generator=generator)
    _, axes = torch.linalg.eigh(covariance)  # columns, the largest last
    axes = axes.flip(1).T[:width]
    return axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # eigh leaves it open
