"""The retrieval kernel `cosine_topk`, the only public name. Copy with: the folder, torch, numpy."""

from kernels.topk import cosine_topk

__all__ = ["cosine_topk"]
