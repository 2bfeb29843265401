"""Any model of timm as the backbone of model.UDON.

    TimmBackbone(name, image_size)    images (B, 3, H, W) -> (B, D), the features that timm pools

    backbone.statistics    (mean, std) that images in [0, 1] are normalised with
    backbone.fill(weights) loads a state dict of timm's, or of the model's authors if timm knows it
    backbone.download()    loads timm's weights for the model from its hub
    import_torchvision()   for timm, beside any build of torch

Copy with: torch, timm (imported when a backbone is built).
"""

import difflib
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")  # of timm's, those that are supported


class TimmError(ValueError):
    """The model cannot be used: one sentence with the name, the reason and the remedy."""


class TimmBackbone(nn.Module):
    """A model of timm without its classifier.

    name        as in timm.list_models(), with or without the tag of its weights
    image_size  side of the images; 0 for the size at which timm's weights were trained. Position
                tables are resized by timm.
    Attributes: `width`, D; `architecture`, {"timm": name, "image_size": side}, which rebuilds this
    module; `statistics`; `interpolation`, of INTERPOLATIONS, with which its images are resized.
    The network computes in evaluation mode in training, too. BatchNorm uses its stored statistics,
    since each batch holds images of one domain, whose statistics are not those of the others; there
    is no dropout and no stochastic depth, so that a run can be repeated and a batch divided.
    Weights are random until `fill` or `download`.
    Raises TimmError if timm is missing, has no such model, or the model cannot take such images.
    """

    def __init__(self, name: str, image_size: int = 0) -> None:
        super().__init__()
        self.name = f"timm:{name}"
        self.network = _create(name)
        native = self.network.pretrained_cfg["input_size"][1]
        self.architecture = {"timm": name, "image_size": image_size or native}
        self._resize()
        self.width = self._probe()

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        settings = self.network.pretrained_cfg
        return tuple(settings["mean"]), tuple(settings["std"])

    @property
    def interpolation(self) -> str:
        stated = self.network.pretrained_cfg["interpolation"]
        if stated in INTERPOLATIONS:
            return stated
        warnings.warn(
            f"timm resizes images for {self.name} with {stated} interpolation, here they are "
            "resized with bicubic interpolation",
            stacklevel=2,
        )
        return "bicubic"

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Loads the weights of this model, at this image size or at timm's own.

        Those of the classifier are ignored. Raises TimmError, and changes nothing, for missing and
        unknown keys and for other shapes.
        """
        name = self.architecture["timm"]
        with torch.device("meta"):
            names = _create(name, classes=1).state_dict().keys()  # with those of the classifier
        if _mismatch(weights, self.network, names) is None:
            _load(weights, self.network)
            return
        network = _create(name)
        converted = _converted(weights, network)
        mismatch = _mismatch(weights, network, names)
        if mismatch is not None and _mismatch(converted, network, names) is not None:
            raise TimmError(f"{mismatch} of {self.name}: give weights of that model")
        _load(weights if mismatch is None else converted, network)
        self._adopt(network)

    def download(self) -> None:
        """Loads timm's own weights. Raises TimmError if there are none or no network."""
        self._adopt(_create(self.architecture["timm"], pretrained=True))

    def _adopt(self, network: nn.Module) -> None:
        """Replaces the weights by those of a model of timm's own image size."""
        device = next(self.network.parameters()).device
        self.network = network.to(device)
        self._resize()
        self.train(self.training)

    def _resize(self) -> None:
        settings, size = self.network.pretrained_cfg, self.architecture["image_size"]
        if size == settings["input_size"][1] or not settings.get("fixed_input_size"):
            return
        if not hasattr(self.network, "set_input_size"):
            raise self._refused_size("its image size is fixed")
        try:
            with _quiet():
                self.network.set_input_size(img_size=size)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise self._refused_size(_summary(error)) from None

    @torch.no_grad()
    def _probe(self) -> int:
        """D, from one black image."""
        size = self.architecture["image_size"]
        self.network.eval()
        try:
            features = self.network(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise self._refused_size(_summary(error)) from None
        self.train(self.training)
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise TimmError(f"{self.name} does not pool its features: use another model")
        return features.shape[1]

    def _refused_size(self, reason: str) -> TimmError:
        native, size = self.network.pretrained_cfg["input_size"][1], self.architecture["image_size"]
        return TimmError(
            f"{self.name} takes no images of {size} pixels ({reason}): use --image-size {native}"
        )

    def train(self, mode: bool = True) -> "TimmBackbone":
        super().train(mode)
        self.network.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes activations again in the backward pass instead of keeping them. Raises an
        AttributeError or AssertionError for a model that cannot."""
        self.network.set_grad_checkpointing(enable)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), not L2-normalised."""
        return self.network(images)


def import_torchvision() -> None:
    """Imports torchvision, as timm and transformers do. Beside a build of torch that it was not
    compiled for, its operators are missing, and it cannot be imported. Two of them are then defined
    without code, which is enough to import it; models of timm do not call them."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def _create(name: str, *, pretrained: bool = False, classes: int = 0) -> Any:
    """timm's model, without a classifier for 0 classes. Raises TimmError."""
    try:
        import_torchvision()
        import timm
    except (ImportError, RuntimeError) as error:
        raise TimmError(
            f"timm:{name} needs the package timm ({error}): pip install -e '.[interop]'"
        ) from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        known = f"did you mean {' or '.join(close)}" if close else "timm.list_models() lists them"
        raise TimmError(f"timm:{name} is unknown to timm {timm.__version__}: {known}")
    try:
        with _quiet():
            return timm.create_model(name, pretrained=pretrained, num_classes=classes)
    except (RuntimeError, OSError, ValueError) as error:
        remedy = "give a file of weights, --init FILE" if pretrained else "use another model"
        raise TimmError(f"timm:{name} cannot be loaded ({_summary(error)}): {remedy}") from None


def _mismatch(
    weights: Mapping[str, Tensor], network: nn.Module, names: Collection[str]
) -> str | None:
    """What keeps the weights, which may have the keys `names`, from filling the network."""
    expected = network.state_dict()
    if missing := [key for key in expected if key not in weights]:
        return f"lacks {len(missing)} keys, such as {missing[0]},"
    if unknown := [key for key in weights if key not in expected and key not in names]:
        return f"has {len(unknown)} keys, such as {unknown[0]}, that are not keys"
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            shapes = tuple(weights[key].shape), tuple(value.shape)
            return f"{key} has shape {shapes[0]}, not the {shapes[1]}"
    return None


def _load(weights: Mapping[str, Tensor], network: nn.Module) -> None:
    network.load_state_dict({key: weights[key] for key in network.state_dict()})


def _converted(weights: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """The weights with the names and shapes of timm's network, if timm can convert them."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    try:
        with _quiet():
            return convert(dict(weights), network)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        return weights


def _summary(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without timm's warnings, which concern its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
