"""The networks of UDON (paper section 3): a ViT backbone, heads and cosine classifiers.

    ViT    images (B, 3, H, W)          -> (B, D), the CLS token after the final norm
    UDON   images (B, 3, H, W), domain  -> Outputs: embeddings and cosines of student and teacher
    SIZES  {name: arguments of ViT}

B batch size, N patches, D backbone width, S student width, T teacher width, C classes of the
batch's domain. The ViT's parameters have timm's names, so that timm's weights load unchanged.
Copy with: torch.
"""

from collections.abc import ItemsView, Iterator, KeysView, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # AugReg and other JAX weights
    "gelu": F.gelu,  # timm, open_clip's LAION weights
    "quick_gelu": quick_gelu,  # OpenAI's CLIP
}

LARGE = 1 << 19  # elements per image of an MLP's hidden layer, reached by b16 and l16

SIZES = {  # micro and mini: our compact networks, to train on a CPU; the others: arXiv:2010.11929
    "micro": dict(image_size=48, patch_size=16, width=96, depth=2, heads=3, stem="conv"),
    "mini": dict(image_size=48, patch_size=16, width=128, depth=4, heads=4, stem="conv"),
    "s16": dict(image_size=224, patch_size=16, width=384, depth=12, heads=6),
    "b16": dict(image_size=224, patch_size=16, width=768, depth=12, heads=12),
    "l16": dict(image_size=224, patch_size=16, width=1024, depth=24, heads=16),
}


# ---- backbone ------------------------------------------------------------------------------------


class StandardisedConv2d(nn.Conv2d):
    """Convolution with standardised kernels: mean 0, norm 1 (arXiv:1903.10520).

    Features after a ReLU have a large common mean, which makes the embeddings of an untrained
    network almost equal (mean cosine 0.95) and training slow. Kernels of mean 0 remove it (0.37).
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        kernel = kernel / kernel.square().sum((1, 2, 3), keepdim=True).add(1e-8).sqrt()
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding)


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, N, D), one token per patch, in row-major order.

    stem  "patch": one convolution with the patch size as its stride, as published
          "conv": 3x3 convolutions of stride 2, then a 1x1 convolution (arXiv:2106.14881)
    """

    def __init__(self, patch_size: int, width: int, stem: str) -> None:
        super().__init__()
        if stem == "patch":
            self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)
        elif stem == "conv":
            self.proj = self._convolutions(patch_size, width)
        else:
            raise ValueError(f"stem {stem!r} is unknown: use 'patch' or 'conv'")

    @staticmethod
    def _convolutions(patch_size: int, width: int) -> nn.Sequential:
        halvings = patch_size.bit_length() - 1
        if patch_size != 2**halvings or halvings < 1:
            raise ValueError(
                f"patch size {patch_size} is not a power of 2, which stem 'conv' needs: change it, "
                "or use stem 'patch'"
            )
        channels = [3] + [max(width * (i + 1) // halvings, 8) for i in range(halvings)]
        layers = []
        for in_channels, out_channels in zip(channels, channels[1:]):
            layers += [
                StandardisedConv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(1, out_channels),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, StandardisedConv2d(channels[-1], width, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N+1, D) -> (B, N+1, D), or the first `tokens` of these."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: int | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N+1, 3, heads, D/heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, heads, N+1, D/heads)
        x = F.scaled_dot_product_attention(query[:, :, :tokens], key, value)
        return self.proj(x.transpose(1, 2).flatten(2))


class ActivatedLinear(torch.autograd.Function):
    """F.linear(activation(x), weight, bias), which keeps x alone for the backward pass and computes
    activation(x) again: about a fifth less memory for the activations of a ViT-B/16, for a few
    percent of its time. x: (..., K), weight: (D, K), bias: (D,) -> (..., D)."""

    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        ctx.save_for_backward(x, weight)
        ctx.activation = activation
        return F.linear(activation(x), weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            activated = ctx.activation(x)
        (of_x,) = torch.autograd.grad(activated, x, gradient @ weight.to(gradient.dtype))
        gradient = gradient.flatten(0, -2)
        return of_x, gradient.T @ activated.detach().flatten(0, -2), gradient.sum(0), None


class Mlp(nn.Module):
    def __init__(self, width: int, hidden_width: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden, activation = self.fc1(x), ACTIVATIONS[self.activation]
        compiles = torch.compiler.is_compiling()  # a compiler decides itself what to keep
        if not compiles and torch.is_grad_enabled() and hidden[0].numel() >= LARGE:
            return ActivatedLinear.apply(hidden, self.fc2.weight, self.fc2.bias, activation)
        return self.fc2(activation(hidden))


class Block(nn.Module):
    """Pre-norm Transformer block, (B, N+1, D) -> (B, N+1, D), or the first `tokens` of these."""

    def __init__(self, width: int, heads: int, hidden_width: int, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden_width, activation)

    def forward(self, x: Tensor, tokens: int | None = None) -> Tensor:
        x = x[:, :tokens] + self.attn(self.norm1(x), tokens)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision Transformer with a CLS token (arXiv:2010.11929).

    activation  "gelu_tanh" | "gelu" | "quick_gelu"; like norm_eps and pre_norm a property of the
                pretrained weights, which `pretrained.load` sets
    pre_norm    adds a LayerNorm before the blocks and drops the bias of the patch projection (CLIP)
    stem        "patch", as published, or "conv", for compact networks that learn from small data
    Attributes: `width`, and `architecture`, the arguments that rebuild this module.
    Raises ValueError for sizes that do not divide and for unknown names.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        activation: str = "gelu_tanh",
        norm_eps: float = 1e-6,
        pre_norm: bool = False,
        stem: str = "patch",
    ) -> None:
        super().__init__()
        if image_size % patch_size or width % heads:
            raise ValueError(
                f"image size {image_size} must be a multiple of patch size {patch_size}, and width "
                f"{width} a multiple of the {heads} heads"
            )
        self.architecture = dict(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            stem=stem,
        )
        self.width = width
        self.patch_embed = PatchEmbed(patch_size, width, stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, width))
        self.norm_pre = nn.Identity()
        hidden_width = int(width * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden_width, activation) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.grad_checkpointing = False
        self.set_family(activation, norm_eps, pre_norm)
        self._initialise()

    def _initialise(self) -> None:
        if self.cls_token.is_meta:  # where normal_ imports torch's compiler, in a second or more
            return
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def set_family(self, activation: str, norm_eps: float, pre_norm: bool) -> None:
        """Sets what a family of pretrained weights requires, in place, and updates `architecture`.

        Raises ValueError, and changes nothing, for an unknown activation, or pre_norm with a stem
        other than "patch".
        """
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r} is unknown: use one of {', '.join(ACTIVATIONS)}"
            )
        width, stem = self.architecture["width"], self.architecture["stem"]
        if pre_norm and stem != "patch":
            raise ValueError(f"pre_norm needs stem 'patch', but the stem is {stem!r}")
        options = dict(device=self.pos_embed.device, dtype=self.pos_embed.dtype)
        if pre_norm != isinstance(self.norm_pre, nn.LayerNorm):
            self.norm_pre = nn.LayerNorm(width, **options) if pre_norm else nn.Identity()
        if stem == "patch" and pre_norm == (self.patch_embed.proj.bias is not None):
            bias = None if pre_norm else nn.Parameter(torch.zeros(width, **options))
            self.patch_embed.proj.bias = bias
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
            elif isinstance(module, Mlp):
                module.activation = activation
        self.architecture.update(activation=activation, norm_eps=norm_eps, pre_norm=pre_norm)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward pass computes each block again from its input, which saves memory;
        named as in timm."""
        self.grad_checkpointing = enable

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) with H = W = image_size -> (B, D), not L2-normalised.

        Raises ValueError for images of another shape.
        """
        size = self.architecture["image_size"]
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}: this ViT takes (B, 3, {size}, {size})"
            )
        patches = self.patch_embed(images)  # (B, N, D)
        # not len(patches), which would fix the batch size in an exported model
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)
        x = torch.cat([cls_token, patches], dim=1) + self.pos_embed  # (B, N+1, D)
        x = self.norm_pre(x)
        for block in self.blocks:
            tokens = 1 if block is self.blocks[-1] else None  # the output is the CLS token alone
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, tokens, use_reentrant=False)
            else:
                x = block(x, tokens)
        return self.norm(x)[:, 0]


# ---- heads and classifiers -----------------------------------------------------------------------


class LecunLinear(nn.Linear):
    """Linear layer; Lecun-normal weights truncated at 2 standard deviations, zero bias."""

    def reset_parameters(self) -> None:
        std = self.in_features**-0.5 / 0.87962566  # the truncated normal's std is 0.8796 of std
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.bias)


class Head(LecunLinear):
    """(B, D) -> (B, width) unit rows: Linear, L2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=1)


class MlpHead(nn.Sequential):
    """(B, D) -> (B, width) unit rows: (Linear, LayerNorm, GELU) x (layers - 1), Linear, L2."""

    def __init__(self, in_width: int, width: int, layers: int) -> None:
        hidden = []
        for _ in range(layers - 1):
            hidden += [LecunLinear(in_width, in_width), nn.LayerNorm(in_width), nn.GELU()]
        super().__init__(*hidden, LecunLinear(in_width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=1)


def build_head(in_width: int, width: int, layers: int) -> Head | MlpHead:
    return Head(in_width, width) if layers == 1 else MlpHead(in_width, width, layers)


class CosineClassifier(nn.Linear):
    """Unit rows (B, width) -> cosines (B, C) with the class weights.

    The weights are normalised in the forward pass, and the gradient flows through the norm.
    Lecun-uniform initialisation, no bias.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes, bias=False)

    def reset_parameters(self) -> None:
        bound = (3 / self.in_features) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.linear(embeddings, F.normalize(self.weight, dim=1))


class DomainModules(nn.ModuleDict):
    """A ModuleDict keyed by domain name, without ModuleDict's restrictions on names.

    A name that ModuleDict refuses, such as "a.b" or "keys", is escaped in the names of parameters
    ("@a%2Eb", "@keys") and only there; other names are used as they are.
    """

    def __getitem__(self, domain: str) -> nn.Module:
        return super().__getitem__(_escape(domain))

    def __setitem__(self, domain: str, module: nn.Module) -> None:
        super().__setitem__(_escape(domain), module)

    def __delitem__(self, domain: str) -> None:
        super().__delitem__(_escape(domain))

    def __contains__(self, domain: object) -> bool:
        return isinstance(domain, str) and super().__contains__(_escape(domain))

    def __iter__(self) -> Iterator[str]:
        return map(_unescape, super().__iter__())

    def keys(self) -> KeysView[str]:
        return dict.fromkeys(self).keys()

    def items(self) -> ItemsView[str, nn.Module]:
        return dict(zip(self, self.values())).items()


_RESERVED = frozenset(dir(nn.ModuleDict()))


def _escape(domain: str) -> str:
    if "." in domain or domain in _RESERVED or domain.startswith("@"):
        return "@" + domain.replace("%", "%25").replace(".", "%2E")
    return domain


def _unescape(key: str) -> str:
    if key.startswith("@"):
        return key[1:].replace("%2E", ".").replace("%25", "%")
    return key


# ---- the model -----------------------------------------------------------------------------------


class Outputs(NamedTuple):
    """Of one batch of one domain; the teacher's fields are None in a model without teachers."""

    backbone: Tensor  # (B, D) unit rows
    student: Tensor  # (B, S) unit rows, the universal embedding
    teacher: Tensor | None  # (B, T) unit rows
    student_cosines: Tensor  # (B, C)
    teacher_cosines: Tensor | None  # (B, C)


class UDON(nn.Module):
    """A backbone, a student head and, per domain, a teacher head and two classifiers.

    backbone     module (B, 3, H, W) -> (B, D) with an attribute `width`, D, such as ViT
    classes      {domain: number of training classes}; any name but the empty one
    teacher_dim  T, or 0 for a model without teachers
    head_layers  linear layers per head; more than 1 gives the MLP heads of the paper's appendix
    Attribute `precision`: the dtype of the backbone's products in training mode, None for that of
    its weights. Everything after the backbone is in float32, and so is evaluation mode.
    Raises ValueError for an empty domain name and for a domain without classes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: Mapping[str, int],
        *,
        student_dim: int = 64,
        teacher_dim: int = 256,
        head_layers: int = 1,
    ) -> None:
        super().__init__()
        for domain, count in classes.items():
            if not domain or count < 1:
                raise ValueError(
                    f"domain {domain!r} has {count} classes: a domain needs a name and at least 1"
                )
        width = backbone.width
        taught = classes if teacher_dim else {}
        self.precision: torch.dtype | None = None
        self.backbone = backbone
        self.student_head = build_head(width, student_dim, head_layers)
        self.student_classifiers = DomainModules(
            {domain: CosineClassifier(student_dim, count) for domain, count in classes.items()}
        )
        self.teacher_heads = DomainModules(
            {domain: build_head(width, teacher_dim, head_layers) for domain in taught}
        )
        self.teacher_classifiers = DomainModules(
            {domain: CosineClassifier(teacher_dim, count) for domain, count in taught.items()}
        )

    def forward(self, images: Tensor, domain: str) -> Outputs:
        """images (B, 3, H, W), all of `domain`, or the backbone's outputs (B, D) for them, where
        these are known. Raises ValueError for an unknown domain."""
        backbone, student, teacher = self.embed_all(images, domain)
        student_cosines = self.student_classifiers[domain](student)  # (B, C)
        if teacher is None:
            return Outputs(backbone, student, None, student_cosines, None)
        teacher_cosines = self.teacher_classifiers[domain](teacher)  # (B, C)
        return Outputs(backbone, student, teacher, student_cosines, teacher_cosines)

    def embed_all(self, images: Tensor, domain: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """The fields backbone, student and teacher of Outputs, without the cosines."""
        if domain not in self.student_classifiers:
            raise ValueError(
                f"domain {domain!r} is unknown to the model: use one of "
                f"{', '.join(self.student_classifiers)}"
            )
        backbone = self.embed_backbone(images)  # (B, D)
        student = self.student_head(backbone)  # (B, S)
        teacher = self.teacher_heads[domain](backbone) if self.teacher_heads else None  # (B, T)
        return backbone, student, teacher

    def embed_backbone(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), or the backbone's outputs (B, D) for them -> (B, D) unit rows, the input of
        every head."""
        if images.ndim == 2:
            return F.normalize(images, dim=1)
        if self.precision is None or not self.training:
            return F.normalize(self.backbone(images), dim=1)
        with torch.autocast(images.device.type, self.precision):
            features = self.backbone(images)
        return F.normalize(features.float(), dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), or the backbone's outputs (B, D) -> (B, S) unit rows, the universal
        embedding; all that inference needs."""
        return self.student_head(self.embed_backbone(images))
