"""The losses of UDON (paper section 3): pure functions, tensors in, one scalar out.    Copy with: torch only.

    classification_loss           cosines (B, C), labels (B,)            -> scalar >= 0
    logit_distillation_loss       cosines (B, C) of student and teacher  -> scalar >= 0, 0 at agreement
    relational_distillation_loss  embeddings (B, S) and (B, T)           -> scalar in [0, 2 x scale], 0 at agreement

B batch, C classes of the batch's domain, S student width, T teacher width. "Cosines" are products of unit vectors, in
[-1, 1]; they become "logits" once multiplied by a scale. Half-precision inputs are computed in float32, also under autocast;
float64 stays float64. Teachers are detached inside the two distillation losses: no gradient ever reaches them from here.
"""

import math

import torch
import torch.nn.functional as F


def _at_least_float32(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def classification_loss(cosines, labels, *, scale=16.0, margin=0.0, kind="normface"):
    """Cross-entropy of scaled cosines, averaged over the batch.

    cosines: (B, C) in [-1, 1].  labels: (B,) integers in 0..C-1.  margin: cosine units (cosface) or radians (arcface).
    kind, which changes the true class c alone:  normface cos(c);  cosface cos(c) - margin;  arcface cos(angle(c) + margin),
    which beyond an angle of pi - margin rises again, as published.
    Zero only with one class. Gradient: to `cosines`; always finite, at cosines of exactly -1 and 1 too.
    Raises ValueError for another kind, or a margin with normface, which has none.
    Source: scale 16 and normface are the official setting; normface arXiv:1704.06369, cosface 1801.09414, arcface 1801.07698.
    """
    cosines, labels = _at_least_float32(cosines), labels.long()
    if kind == "normface":
        if margin:
            raise ValueError(
                f"margin is {margin} but normface has none: leave it 0, or use kind 'cosface' or 'arcface'"
            )
        return F.cross_entropy(scale * cosines, labels)
    true = cosines.gather(1, labels[:, None])  # (B, 1)
    if kind == "cosface":
        true = true - margin
    elif kind == "arcface":
        sine_squared = (1 - true) * (1 + true)
        inside = sine_squared > 0  # at +-1 the square root has no finite slope: a constant 0 there
        sine = torch.where(inside, torch.where(inside, sine_squared, 1.0).sqrt(), 0.0)
        true = true * math.cos(margin) - sine * math.sin(margin)
    else:
        raise ValueError(
            f"classification loss {kind!r} is unknown: use 'normface', 'cosface' or 'arcface'"
        )
    return F.cross_entropy(scale * cosines.scatter(1, labels[:, None], true), labels)


def logit_distillation_loss(
    student_cosines, teacher_cosines, *, student_temperature=0.1, teacher_temperature=0.1
):
    """KL(softmax(teacher cosines / 0.1) || softmax(student cosines / 0.1)), averaged over the batch; no T^2 factor.

    student_cosines, teacher_cosines: (B, C) in [-1, 1].  Range [0, inf); 0 with zero gradient where the two agree.
    Gradient: to `student_cosines` only.  Raises ValueError for shapes that differ.  Source: paper section 3, official temperatures.
    """
    if student_cosines.shape != teacher_cosines.shape:
        raise ValueError(
            f"student cosines are {tuple(student_cosines.shape)}, teacher cosines {tuple(teacher_cosines.shape)}: "
            "both must be (B, C) of the same batch and classes"
        )
    student = F.log_softmax(
        _at_least_float32(student_cosines) / student_temperature, dim=1
    )  # (B, C)
    teacher = F.log_softmax(
        _at_least_float32(teacher_cosines).detach() / teacher_temperature, dim=1
    )  # (B, C)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def relational_distillation_loss(student, teacher, *, scale=32.0):
    """scale x mean, over all B x B pairs, of the squared difference of student and teacher cosine similarities.

    student: (B, S), teacher: (B, T), any row norm (rows are normalised here).  Range [0, 2 x scale]; 0 with zero gradient
    where the two similarity matrices agree; unchanged by a rotation of either embedding.  Gradient: to `student` only.
    Raises ValueError for batches of different size.
    Source: paper section 3; the official sum works out as scale 32 at its batch of 128.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"there are {len(student)} student and {len(teacher)} teacher embeddings: they must be of the same images"
        )
    student = F.normalize(_at_least_float32(student), dim=1)
    teacher = F.normalize(_at_least_float32(teacher).detach(), dim=1)
    with torch.autocast(student.device.type, enabled=False):
        return scale * (student @ student.T - teacher @ teacher.T).square().mean()
