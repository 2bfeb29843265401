"""A training step of UDON in JAX, with the official code's semantics, to measure ours against.

    from_torch(state)     arrays of model.UDON's state dict in JAX's layouts -> parameters
    to_torch(parameters)  the inverse
    losses(...)           the four losses and their mean, of one batch of one domain
    adamw(...)            the optimizer
    build_step(...)       a jitted function of a training step

Parameters are {name: array} with the names of model.UDON. Layouts are JAX's: kernels (in, out),
images (B, H, W, 3). The gradients of all parameters are computed, so that those of inactive heads
are zero, and AdamW moves all parameters. Layers are computed as flax.linen computes them. With
`flat`, linear layers take the tokens as the rows of a matrix, which XLA multiplies faster. B batch,
N patches, D width, S student width, T teacher width, C classes.
Copy with: jax, optax, numpy.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Parameters = Mapping[str, jax.Array]


class Losses(NamedTuple):
    total: jax.Array
    teacher_classification: jax.Array
    student_classification: jax.Array
    logit_distillation: jax.Array
    relational_distillation: jax.Array


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Parameters of arrays in torch's layouts."""
    return {name: jnp.array(_transposed(array, (2, 3, 1, 0))) for name, array in state.items()}


def to_torch(parameters: Parameters) -> dict[str, np.ndarray]:
    """Arrays in torch's layouts."""
    return {
        name: _transposed(np.asarray(array), (3, 2, 0, 1)) for name, array in parameters.items()
    }


def _transposed(array, convolution):
    if array.ndim == 4:
        return array.transpose(convolution)
    return array.T if array.ndim == 2 else array


# The model ----------------------------------------------------------------------------------------


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=axis, keepdims=True)


def linear(parameters: Parameters, name: str, x: jax.Array, flat: bool = False) -> jax.Array:
    """(..., in) -> (..., out)"""
    rows = x.reshape(-1, x.shape[-1]) if flat else x
    y = rows @ parameters[f"{name}.weight"] + parameters[f"{name}.bias"]
    return y.reshape(*x.shape[:-1], -1)


def layer_norm(parameters: Parameters, name: str, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean)
    scale = jax.lax.rsqrt(variance + 1e-6) * parameters[f"{name}.weight"]
    return (x - mean) * scale + parameters[f"{name}.bias"]


def attention(parameters: Parameters, name: str, x: jax.Array, heads: int, flat: bool) -> jax.Array:
    """(B, N+1, D) -> (B, N+1, D)"""
    qkv = linear(parameters, f"{name}.qkv", x, flat)
    query, key, value = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, heads, -1), 2, 0)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query / query.shape[-1] ** 0.5, key)
    x = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
    return linear(parameters, f"{name}.proj", x.reshape(*x.shape[:2], -1), flat)


def mlp(parameters: Parameters, name: str, x: jax.Array, flat: bool) -> jax.Array:
    hidden = jax.nn.gelu(linear(parameters, f"{name}.fc1", x, flat), approximate=True)
    return linear(parameters, f"{name}.fc2", hidden, flat)


def backbone(
    parameters: Parameters, images: jax.Array, heads: int, flat: bool = False
) -> jax.Array:
    """(B, H, W, 3) -> (B, D)"""
    kernel = parameters["backbone.patch_embed.proj.weight"]
    patches = jax.lax.conv_general_dilated(
        images, kernel, kernel.shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    patches += parameters["backbone.patch_embed.proj.bias"]
    count, width = patches.shape[0], patches.shape[3]
    cls_token = jnp.broadcast_to(parameters["backbone.cls_token"], (count, 1, width))
    x = jnp.concatenate([cls_token, patches.reshape(count, -1, width)], axis=1)
    x += parameters["backbone.pos_embed"]
    depth = sum(name.endswith("attn.qkv.bias") for name in parameters)
    for block in (f"backbone.blocks.{number}" for number in range(depth)):
        normed = layer_norm(parameters, f"{block}.norm1", x)
        x += attention(parameters, f"{block}.attn", normed, heads, flat)
        x += mlp(parameters, f"{block}.mlp", layer_norm(parameters, f"{block}.norm2", x), flat)
    return layer_norm(parameters, "backbone.norm", x)[:, 0]


def head(parameters: Parameters, name: str, x: jax.Array) -> jax.Array:
    return unit(linear(parameters, name, x))


def cosines(parameters: Parameters, name: str, embeddings: jax.Array) -> jax.Array:
    return embeddings @ unit(parameters[f"{name}.weight"], axis=0)


# The losses (paper section 3) ---------------------------------------------------------------------


def losses(
    parameters: Parameters,
    images: jax.Array,
    labels: jax.Array,
    domain: str,
    heads: int,
    flat: bool = False,
) -> tuple[jax.Array, Losses]:
    """images (B, H, W, 3) float32, labels (B,) -> total, all losses."""
    stop = jax.lax.stop_gradient
    features = unit(backbone(parameters, images, heads, flat))
    classifier = f"student_classifiers.{domain}"
    student = head(parameters, "student_head", features)
    student_cosines = cosines(parameters, classifier, student)
    teacher = head(parameters, f"teacher_heads.{domain}", features)
    teacher_cosines = cosines(parameters, f"teacher_classifiers.{domain}", teacher)
    # Distillation trains the student's head and classifier, and nothing beyond.
    distilled = head(parameters, "student_head", stop(features))
    distilled_cosines = cosines(parameters, classifier, distilled)

    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    target = jax.nn.log_softmax(stop(teacher_cosines) / 0.1)
    kl = jnp.exp(target) * (target - jax.nn.log_softmax(distilled_cosines / 0.1))
    difference = distilled @ distilled.T - stop(teacher @ teacher.T)
    terms = (
        cross_entropy(16 * teacher_cosines, labels).mean(),
        cross_entropy(16 * student_cosines, labels).mean(),
        kl.sum(1).mean(),
        32 * jnp.square(difference).mean(),
    )
    total = sum(terms) / len(terms)
    return total, Losses(total, *terms)


# The step -----------------------------------------------------------------------------------------


def adamw(backbone_lr: float, head_lr: float, weight_decay: float) -> optax.GradientTransformation:
    """Of all parameters, with two learning rates."""
    optimizer = partial(optax.adamw, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)
    rates = {"backbone": optimizer(backbone_lr), "heads": optimizer(head_lr)}

    def groups(parameters):
        return {
            name: "backbone" if name.startswith("backbone.") else "heads" for name in parameters
        }

    return optax.multi_transform(rates, groups)


def build_step(optimizer: optax.GradientTransformation, heads: int, flat: bool = False) -> Callable:
    """-> step(parameters, state, pixels (B, H, W, 3) uint8, labels, domain) -> parameters, state,
    Losses. The first two arguments are donated."""

    @partial(jax.jit, static_argnames="domain", donate_argnums=(0, 1))
    def step(parameters, state, pixels, labels, domain):
        images = (pixels.astype(jnp.float32) / 255 - 0.5) / 0.5
        gradients, values = jax.grad(losses, has_aux=True)(
            parameters, images, labels, domain, heads, flat
        )
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, values

    return step
