"""The losses of UDON (paper section 3): pure functions from tensors to one scalar.

    classification_loss           cosines (B, C), labels (B,)         -> scalar >= 0
    logit_distillation_loss       student and teacher cosines (B, C)  -> scalar >= 0
    relational_distillation_loss  embeddings (B, S) and (B, T)        -> scalar in [0, 2 x scale]

B batch size, C classes of the batch's domain, S student width, T teacher width. Cosines are
products of unit vectors, in [-1, 1]; they become logits once multiplied by a scale. Both
distillation losses are 0 where student and teacher agree, and detach the teacher.
Half-precision inputs are computed in float32, also under autocast; float64 stays float64.
Copy with: torch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def classification_loss(
    cosines: Tensor,
    labels: Tensor,
    *,
    scale: float = 16.0,
    margin: float = 0.0,
    kind: str = "normface",
) -> Tensor:
    """Cross-entropy of scaled cosines, averaged over the batch.

    cosines  (B, C) floating point, in [-1, 1]
    labels   (B,) integers in 0..C-1
    kind     what becomes of the true class's cosine cos(a): "normface" cos(a),
             "cosface" cos(a) - margin, "arcface" cos(a + margin), which rises for a > pi - margin
    margin   a difference of cosines for cosface, radians for arcface, 0 for normface
    Range [0, inf); always 0 if C = 1. Gradient: to `cosines`, finite even at exactly -1 and 1.
    Raises ValueError for an unknown kind, a margin with normface, and labels of another shape,
    dtype or range. The range is checked on the CPU only: reading labels would stall a GPU, where
    cross-entropy has an assertion of its own.
    Source: scale 16 and normface are the official setting. normface arXiv:1704.06369,
    cosface arXiv:1801.09414, arcface arXiv:1801.07698.
    """
    check_labels(labels, cosines.shape)
    cosines, labels = at_least_float32(cosines), labels.long()
    if kind != "normface" or margin:
        true = cosines.gather(1, labels[:, None])  # (B, 1)
        true = true_class_cosines(true, margin, kind)
        cosines = cosines.scatter(1, labels[:, None], true)
    return F.cross_entropy(scale * cosines, labels)


def true_class_cosines(cosines: Tensor, margin: float, kind: str) -> Tensor:
    """The true class's cosines after the margin, any shape; see classification_loss."""
    if kind == "normface":
        if margin:
            raise ValueError(
                f"margin is {margin}, but normface has no margin: set it to 0, or use kind "
                "'cosface' or 'arcface'"
            )
        return cosines
    if kind == "cosface":
        return cosines - margin
    if kind == "arcface":
        return cosines * math.cos(margin) - _sine(cosines) * math.sin(margin)
    raise ValueError(
        f"classification loss {kind!r} is unknown: use 'normface', 'cosface' or 'arcface'"
    )


def logit_distillation_loss(
    student_cosines: Tensor,
    teacher_cosines: Tensor,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.1,
) -> Tensor:
    """KL(softmax(teacher / 0.1) || softmax(student / 0.1)), averaged over the batch; no T^2 factor.

    student_cosines, teacher_cosines  (B, C) floating point, in [-1, 1]
    Range [0, inf); 0 with zero gradient where the two distributions agree.
    Gradient: to `student_cosines` only. Raises ValueError if the shapes differ.
    Source: paper section 3, official temperatures.
    """
    check_shapes(student_cosines.shape, teacher_cosines.shape)
    student_logits = at_least_float32(student_cosines) / student_temperature
    teacher_logits = at_least_float32(teacher_cosines).detach() / teacher_temperature
    student = F.log_softmax(student_logits, dim=1)  # (B, C)
    teacher = F.log_softmax(teacher_logits, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def relational_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    scale: float = 32.0,
    whole: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """scale x mean squared difference of the student's and the teacher's B x B cosine matrices.

    student  (B, S) floating point; rows of any length, normalised here
    teacher  (B, T) likewise
    whole    student (A, S) and teacher (A, T) of a batch that is computed in parts, in which
             `student` and `teacher` are B of the rows. The value is then the share of these rows in
             the loss of the whole batch; its gradient is that of the whole loss.
    Range [0, 2 x scale]; 0 with zero gradient where the two matrices agree; invariant to a
    rotation of either embedding. Gradient: to `student` only.
    Raises ValueError if the batch sizes differ.
    Source: paper section 3; the official sum equals scale 32 at its batch size of 128.
    """
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"there are {student.shape[0]} student and {teacher.shape[0]} teacher embeddings: "
            "both must be of the same images"
        )
    student = F.normalize(at_least_float32(student), dim=1)
    teacher = F.normalize(at_least_float32(teacher).detach(), dim=1)
    with torch.autocast(student.device.type, enabled=False):
        if whole is None:
            return scale * (student @ student.T - teacher @ teacher.T).square().mean()
        students, teachers = (F.normalize(at_least_float32(x).detach(), dim=1) for x in whole)
        differences = student @ students.T - teacher @ teachers.T  # (B, A)
        loss = scale * differences.square().sum() / students.shape[0] ** 2
        # Each pair is in two entries of the A x A matrix, of which only one has a gradient here.
        return loss + (loss - loss.detach())


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sine(cosines: Tensor) -> Tensor:
    """sqrt(1 - cosines^2), but a constant 0 at -1 and 1, where the square root has no gradient."""
    squared = (1 - cosines) * (1 + cosines)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def check_shapes(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    """Raises ValueError unless the cosines of student and teacher have the same shape."""
    if student != teacher:
        raise ValueError(
            f"student cosines have shape {tuple(student)}, teacher cosines {tuple(teacher)}: "
            "both must be (B, C) for the same images and classes"
        )


def check_labels(labels: Tensor, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or labels.shape != shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, cosines {tuple(shape)}: "
            "labels must be (B,), one class index an image, and cosines (B, C)"
        )
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels are {labels.dtype}: they must be integers, such as torch.int64")
    if labels.device.type == "cpu" and labels.numel():
        least, most = (value.item() for value in labels.long().aminmax())
        if least < 0 or most >= shape[1]:
            raise ValueError(
                f"labels range from {least} to {most}: with {shape[1]} classes they must "
                f"be in 0..{shape[1] - 1}"
            )
