"""The networks of UDON (paper section 3): one ViT backbone, a student head, a teacher head per domain, cosine classifiers.
Copy with: torch only.

    ViT    images (B, 3, H, W)          -> (B, D)   CLS token after the final norm, any length
    UDON   images (B, 3, H, W), domain  -> Outputs: backbone (B, D), student (B, S), teacher (B, T), all unit rows, and
                                           cosines (B, C) in [-1, 1] of student and teacher with the domain's classifiers

B batch, N patches, D backbone width, S student width, T teacher width, C classes of the batch's domain.
The ViT's parameters carry timm's names, so that timm's weights load without a table of renames.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # AugReg and the other JAX weights
    "gelu": F.gelu,  # timm's own, open_clip's LAION weights
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's CLIP
}

SIZES = {  # S/16, B/16, L/16: arXiv:2010.11929 and 2106.10270
    "micro": dict(
        image_size=48, patch_size=16, width=96, depth=2, heads=3, stem="conv"
    ),  # ours: learn from small data, on a
    "mini": dict(
        image_size=48, patch_size=16, width=128, depth=4, heads=4, stem="conv"
    ),  # processor
    "s16": dict(image_size=224, patch_size=16, width=384, depth=12, heads=6),
    "b16": dict(image_size=224, patch_size=16, width=768, depth=12, heads=12),
    "l16": dict(image_size=224, patch_size=16, width=1024, depth=24, heads=16),
}


class StandardisedConv2d(nn.Conv2d):
    """Convolution whose kernels are standardised: mean 0, norm 1 (arXiv:1903.10520, as in ResNet + ViT hybrids).

    Features after a ReLU share a large mean, which makes the unit embeddings of an untrained network almost equal (mean cosine
    0.95). A kernel of mean 0 does not pass it on (0.37), and training gets away from there many times faster.
    """

    def forward(self, x):
        kernel = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        kernel = kernel / kernel.square().sum((1, 2, 3), keepdim=True).add(1e-8).sqrt()
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding)


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, N, D): one patch_size-strided convolution, or 3x3 convolutions of stride 2 and a 1x1 one."""

    def __init__(self, patch_size, width, stem):
        super().__init__()
        if stem == "patch":
            self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)
        elif stem == "conv":  # early convolutions: arXiv:2106.14881
            halvings = patch_size.bit_length() - 1
            if patch_size != 2**halvings or halvings < 1:
                raise ValueError(
                    f"patch size {patch_size} cannot be had from convolutions of stride 2: use a power of 2, or "
                    "stem='patch'"
                )
            channels = [3] + [max(width * (i + 1) // halvings, 8) for i in range(halvings)]
            layers = []
            for before, after in zip(channels, channels[1:]):
                layers += [
                    StandardisedConv2d(before, after, 3, stride=2, padding=1, bias=False),
                    nn.GroupNorm(1, after),
                    nn.ReLU(),
                ]
            self.proj = nn.Sequential(*layers, StandardisedConv2d(channels[-1], width, 1))
        else:
            raise ValueError(f"stem {stem!r} is unknown: use 'patch' or 'conv'")

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):  # (B, N+1, D)
        q, k, v = (
            self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # 3 x (B, heads, N+1, D/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, hidden, activation):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x):
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, hidden, activation):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden, activation)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision Transformer (arXiv:2010.11929), pre-norm blocks, CLS token.

    forward(images (B, 3, H, W) float, H = W = image_size) -> (B, width): the CLS token after the final norm, not L2-normalised.
    activation  "gelu_tanh" | "gelu" | "quick_gelu" and norm_eps belong to the weights' family; pretrained.load sets them
    pre_norm    CLIP's: a LayerNorm before the blocks, and no bias in the patch projection
    stem        "patch", as published, or "conv": stride-2 3x3 convolutions, for compact sizes that learn from small data
    Raises ValueError for sizes that do not divide, unknown names, and images of another size.
    """

    def __init__(
        self,
        image_size=224,
        patch_size=16,
        width=768,
        depth=12,
        heads=12,
        mlp_ratio=4.0,
        *,
        activation="gelu_tanh",
        norm_eps=1e-6,
        pre_norm=False,
        stem="patch",
    ):
        super().__init__()
        if image_size % patch_size or width % heads:
            raise ValueError(
                f"image size {image_size} must be a multiple of patch size {patch_size}, and width {width} a "
                f"multiple of the {heads} heads"
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
        self.blocks = nn.ModuleList(
            Block(width, heads, int(width * mlp_ratio), activation) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.set_family(activation, norm_eps, pre_norm)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def set_family(self, activation, norm_eps, pre_norm):
        """Switches what a family of public weights fixes beside the weights; `architecture` always rebuilds the module."""
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r} is unknown: use one of {', '.join(ACTIVATIONS)}"
            )
        width, stem = self.architecture["width"], self.architecture["stem"]
        if pre_norm and stem != "patch":
            raise ValueError(f"pre_norm goes with stem 'patch', not with stem {stem!r}")
        like = dict(device=self.pos_embed.device, dtype=self.pos_embed.dtype)
        if pre_norm != isinstance(self.norm_pre, nn.LayerNorm):
            self.norm_pre = nn.LayerNorm(width, **like) if pre_norm else nn.Identity()
        if stem == "patch" and pre_norm == (self.patch_embed.proj.bias is not None):
            self.patch_embed.proj.bias = (
                None if pre_norm else nn.Parameter(torch.zeros(width, **like))
            )
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
            elif isinstance(module, Mlp):
                module.activation = activation
        self.architecture.update(activation=activation, norm_eps=norm_eps, pre_norm=pre_norm)

    def forward(self, images):
        size = self.architecture["image_size"]
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images are {tuple(images.shape)}: this ViT takes (B, 3, {size}, {size})"
            )
        x = self.patch_embed(images)  # (B, N, D)
        x = (
            torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        )  # (B, N+1, D)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]  # (B, D)


class LecunLinear(nn.Linear):
    """Linear with bias; Lecun-normal weights (truncated at 2 std), zero bias."""

    def reset_parameters(self):
        std = (
            self.in_features**-0.5 / 0.87962566
        )  # truncation at 2 std shrinks a normal to 0.8796 of its std
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.bias)


class Head(LecunLinear):
    """(B, D) -> (B, width) unit rows: Linear with bias, then L2."""

    def forward(self, x):
        return F.normalize(super().forward(x), dim=1)


class MlpHead(nn.Sequential):
    """(B, D) -> (B, width) unit rows: `layers` Linear layers, LayerNorm and GELU between them (the paper's variant), then L2."""

    def __init__(self, in_width, width, layers):
        between = [
            (LecunLinear(in_width, in_width), nn.LayerNorm(in_width), nn.GELU())
            for _ in range(layers - 1)
        ]
        super().__init__(*sum(between, ()), LecunLinear(in_width, width))

    def forward(self, x):
        return F.normalize(super().forward(x), dim=1)


def build_head(in_width, width, layers):
    return Head(in_width, width) if layers == 1 else MlpHead(in_width, width, layers)


class CosineClassifier(nn.Linear):
    """Unit rows (B, width) -> cosines (B, C) with the normalised class weights; the gradient flows through the norm.
    Lecun-uniform weights, no bias."""

    def __init__(self, width, classes):
        super().__init__(width, classes, bias=False)

    def reset_parameters(self):
        bound = (3 / self.in_features) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, embeddings):
        return F.linear(embeddings, F.normalize(self.weight, dim=1))


class Outputs(NamedTuple):
    backbone: torch.Tensor  # (B, D) unit rows
    student: torch.Tensor  # (B, S) unit rows, the universal embedding
    teacher: torch.Tensor  # (B, T) unit rows; None in a model without teachers
    student_cosines: torch.Tensor  # (B, C)
    teacher_cosines: torch.Tensor  # (B, C); None in a model without teachers


class UDON(nn.Module):
    """Backbone, student head, and per domain: a teacher head, a student classifier, a teacher classifier.

    backbone     a module (B, 3, H, W) -> (B, D) with D as its attribute `width`, such as ViT
    classes      {domain: number of training classes}; every per-domain module is keyed by the domain's name
    teacher_dim  0 leaves the teachers out: the single-model baselines
    head_layers  1, or as many linear layers as an MLP head of the paper's appendix has, D wide between them
    Raises ValueError for a domain name that cannot name a parameter, or without one class, and for an unknown domain.
    """

    def __init__(self, backbone, classes, *, student_dim=64, teacher_dim=256, head_layers=1):
        super().__init__()
        for domain, count in classes.items():
            if not domain or "." in domain or hasattr(nn.ModuleDict(), domain) or count < 1:
                raise ValueError(
                    f"domain {domain!r} with {count} classes: the name must have no dot and be none, such as 'keys', "
                    "that torch.nn.ModuleDict uses itself, and there must be at least 1 class: rename the domain"
                )
        self.backbone = backbone
        self.student_head = build_head(backbone.width, student_dim, head_layers)
        self.student_classifiers = nn.ModuleDict(
            {d: CosineClassifier(student_dim, c) for d, c in classes.items()}
        )
        taught = classes if teacher_dim else {}
        self.teacher_heads = nn.ModuleDict(
            {d: build_head(backbone.width, teacher_dim, head_layers) for d in taught}
        )
        self.teacher_classifiers = nn.ModuleDict(
            {d: CosineClassifier(teacher_dim, c) for d, c in taught.items()}
        )

    def forward(self, images, domain):
        if domain not in self.student_classifiers:
            raise ValueError(
                f"domain {domain!r} is unknown to the model: use one of {', '.join(self.student_classifiers)}"
            )
        backbone = self.embed_backbone(images)  # (B, D)
        student = self.student_head(backbone)  # (B, S)
        student_cosines = self.student_classifiers[domain](student)  # (B, C)
        if not self.teacher_heads:
            return Outputs(backbone, student, None, student_cosines, None)
        teacher = self.teacher_heads[domain](backbone)  # (B, T)
        return Outputs(
            backbone, student, teacher, student_cosines, self.teacher_classifiers[domain](teacher)
        )

    def embed_backbone(self, images):
        """(B, 3, H, W) -> (B, D) unit rows: what every head reads."""
        return F.normalize(self.backbone(images), dim=1)

    def embed(self, images):
        """(B, 3, H, W) -> (B, S) unit rows: the universal embedding. All that inference needs."""
        return self.student_head(self.embed_backbone(images))
