"""Classification and logit distillation over very many classes, in little memory.

    large_class_losses   embeddings (B, S), class weights (C, S), labels (B,) -> two scalars
    MANY_CLASSES         number of classes up to which the plain formulas are used
    chunks_of(rows)      a context: chunks are those of a batch of so many rows

Values and gradients are those of losses.py. The cosines (B, C), 115 MB a matrix for the 224,408
classes of Met, are computed in chunks of K classes: once for the losses, again for the gradients.
B batch size, C classes of the batch's domain, S student width, T teacher width.
Copy with: losses.py, torch.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import at_least_float32, check_labels, check_shapes, true_class_cosines

MANY_CLASSES = 10_000  # beyond it chunks are as fast, and the plain formulas need 80 MB and more
BYTES = 16 * 2**20  # of a chunk: smaller ones start more kernels, larger ones leave a CPU's cache
_rows: int | None = None  # B that chunks are made for; None: that of the embeddings


def large_class_losses(
    embeddings: Tensor,
    weights: Sequence[Tensor],
    labels: Tensor | None = None,
    distilled: Tensor | None = None,
    targets: Tensor | None = None,
    target_weight: Tensor | None = None,
    *,
    scale: float = 16.0,
    margin: float = 0.0,
    kind: str = "normface",
    domain_margin: float = 0.0,
    temperature: float = 0.1,
) -> tuple[Tensor | None, Tensor | None]:
    """classification_loss, None without labels, and logit_distillation_loss, None without targets,
    of the cosines between embeddings and class weights.

    embeddings  (B, S) floating point, unit rows
    weights     of the classes (C, S), normalised here; then those of other domains: more negatives
                of the classification loss, whose cosines are raised by domain_margin
    labels      (B,) integers in 0..C-1
    distilled   (B, S) equal to the embeddings, in whose place the distillation loss trains it
    targets     to distil from, detached: unit rows (B, T) with class weights target_weight (C, T)
    Memory: at most BYTES, and the gradients, one tensor for each weight.
    The other arguments, gradients, ranges and errors: see losses.py.
    """
    embeddings, shape = at_least_float32(embeddings), (len(embeddings), len(weights[0]))
    if labels is not None:
        check_labels(labels, shape)
        labels = labels.long()
    if targets is not None:
        check_shapes(shape, (len(targets), len(target_weight)))
        targets = at_least_float32(targets)
        distilled = embeddings if distilled is None else at_least_float32(distilled)
    with torch.autocast(embeddings.device.type, enabled=False):
        rest, true, divergence = _Rows.apply(
            *(embeddings, distilled, weights[0], labels, targets, target_weight),
            *(scale, temperature),
        )
        distillation = None if divergence is None else divergence.mean()
        if labels is None:
            return None, distillation
        rests, absent = [rest], torch.full_like(labels, -1)
        for weight in weights[1:]:
            others = (embeddings, None, weight, absent, None, None, scale, temperature)
            rests.append(_Rows.apply(*others)[0] + scale * domain_margin)
        rest = torch.logsumexp(torch.stack(rests), dim=0)
        true = scale * true_class_cosines(true, margin, kind)
        return -F.logsigmoid(true - rest).mean(), distillation


@contextlib.contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """While it is entered, a batch of any size is computed in as many chunks as one of `rows` rows,
    so that its memory is the same function of the size."""
    global _rows
    before, _rows = _rows, rows
    try:
        yield
    finally:
        _rows = before


class _Rows(torch.autograd.Function):
    """Three values of each row, (B,) each, or None without labels or without targets:

    rest        log-sum-exp of the logits of all classes but the true one, of all for label -1
    true        cosine of the true class
    divergence  KL(teacher || student) = mean of teacher - student logits under the teacher's
                probabilities - log-sum-exp of the teacher's logits + that of the student's
    """

    @staticmethod
    def forward(
        ctx, embeddings, distilled, weight, labels, targets, target_weight, scale, temperature
    ):
        true, mean = embeddings.new_zeros(2, len(embeddings))
        rest, student, teacher = embeddings.new_full((3, len(embeddings)), -torch.inf)
        for part in _parts(embeddings, weight, target_weight):
            cosines, _ = _cosines(embeddings, weight, part)
            if targets is not None:
                s = cosines / temperature
                t, _ = _cosines(targets, target_weight, part, 1 / temperature)
                student = torch.logaddexp(student, s.logsumexp(1))
                before, added = teacher, t.logsumexp(1)
                teacher = torch.logaddexp(before, added)
                probabilities = t.softmax(1)
                added_mean = torch.linalg.vecdot(probabilities, t.sub_(s))
                mean = (before - teacher).exp() * mean + (added - teacher).exp() * added_mean
            if labels is not None:
                columns, inside = _true_class(labels, part)
                own = cosines.gather(1, columns)
                true += torch.where(inside, own, 0.0)[:, 0]
                cosines.scatter_(1, columns, torch.where(inside, -torch.inf, own))
                rest = torch.logaddexp(rest, cosines.mul_(scale).logsumexp(1))
        ctx.save_for_backward(
            *(embeddings, weight, labels, targets, target_weight, rest, student, teacher)
        )
        ctx.scale, ctx.temperature = scale, temperature
        classification = (None, None) if labels is None else (rest, true)
        return *classification, None if targets is None else mean - teacher + student

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, rest_gradient, true_gradient, divergence_gradient):
        saved, scale, temperature = ctx.saved_tensors, ctx.scale, ctx.temperature
        embeddings, weight, labels, targets, target_weight, rest, student, teacher = saved
        classified_gradient = None if labels is None else torch.zeros_like(embeddings)
        distilled_gradient = None if targets is None else torch.zeros_like(embeddings)
        weight_gradient = torch.empty_like(weight)
        for part in _parts(embeddings, weight, target_weight):
            cosines, norms = _cosines(embeddings, weight, part)
            rows = weight[part].to(cosines.dtype)  # (K, S)
            total = 0.0
            if labels is not None:
                columns, inside = _true_class(labels, part)
                gradient = (scale * cosines).sub_(rest[:, None]).exp_()  # (B, K)
                gradient *= scale * rest_gradient[:, None]
                own = torch.where(inside, true_gradient[:, None], gradient.gather(1, columns))
                total = gradient.scatter_(1, columns, own).div_(norms)
                classified_gradient.addmm_(total, rows)
            if targets is not None:
                t, _ = _cosines(targets, target_weight, part, 1 / temperature)
                gradient = (cosines / temperature).sub_(student[:, None]).exp_()
                gradient -= t.sub_(teacher[:, None]).exp_()
                gradient.mul_(divergence_gradient[:, None] / temperature).div_(norms)
                distilled_gradient.addmm_(gradient, rows)
                total = gradient.add_(total)
            # Gradient of the normalised weights without its component along them.
            along = (total.mul(cosines).sum(0) / norms)[:, None]
            gradient = total.T @ embeddings
            torch.addcmul(gradient, rows, along, value=-1, out=weight_gradient[part])
        return classified_gradient, distilled_gradient, weight_gradient, *[None] * 5


def _parts(embeddings: Tensor, weight: Tensor, target_weight: Tensor | None) -> Iterator[slice]:
    """The classes in chunks, of which 5 matrices (B, K) and 2 (K, S or T) take at most BYTES."""
    width = max(weight.shape[1], 0 if target_weight is None else target_weight.shape[1])
    values = BYTES // embeddings.element_size()
    classes = max(1, values // (5 * (_rows or len(embeddings)) + 2 * width))
    for start in range(0, len(weight), classes):
        yield slice(start, min(start + classes, len(weight)))


def _true_class(labels: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """The true class's column in a chunk, and whether it has one, (B, 1) each."""
    columns = labels[:, None] - part.start
    last = part.stop - part.start - 1
    return columns.clamp(0, last), (columns >= 0) & (columns <= last)


def _cosines(embeddings, weight, part, scale=1.0) -> tuple[Tensor, Tensor]:
    """(B, K) scaled cosines with the classes of a chunk, and (K,) norms of the weights."""
    rows = weight[part].to(embeddings.dtype)
    norms = torch.linalg.vector_norm(rows, dim=1).clamp_(min=1e-12)
    return (embeddings @ rows.T).mul_(scale / norms), norms
