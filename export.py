"""What `python checkpoint.py export` writes beside weights: an ONNX network and a model card.

    onnx_network(model, size, preprocessing, texts)  -> bytes of a .onnx file
    card(contents, results)                         -> Markdown

Copy with: torch (onnx and onnxscript where a network is made).
"""

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

TITLE = "# Model card: a UDON student"


class ExportError(ValueError):
    """A model that cannot be exported: one sentence with the reason and the remedy."""


# ONNX ---------------------------------------------------------------------------------------------


class Deployed(nn.Module):
    """Images (B, 3, S, S) uint8 -> embeddings (B, width), with the normalisation inside."""

    def __init__(self, model: nn.Module, preprocessing: dict) -> None:
        super().__init__()
        self.model = model
        for name in ("mean", "std"):
            values = torch.tensor(preprocessing[name], dtype=torch.float32)
            self.register_buffer(f"pixel_{name}", values.view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model.embed((images.float() / 255 - self.pixel_mean) / self.pixel_std)


def onnx_network(model: nn.Module, size: int, preprocessing: dict, texts: dict[str, str]) -> bytes:
    """model.embed as an ONNX network from "images", (B, 3, size, size) uint8, to "vectors", (B,
    width) float32, for any B. Weights that half precision holds exactly are stored so. `texts` are
    its metadata. Raises ExportError for missing packages and networks that ONNX cannot express."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"ONNX needs the packages onnx and onnxscript ({error}): pip install -e '.[export]'"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # It warns of each operator of torchvision where that is not installed.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                Deployed(model, preprocessing).eval(),
                (torch.zeros(2, 3, size, size, dtype=torch.uint8),),
                input_names=["images"],
                output_names=["vectors"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # torch.export, torch.onnx and onnxscript share no class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ExportError(
                f"the backbone cannot be expressed in ONNX ({reason}): export to .pt"
            ) from None
    network = program.model_proto
    halve(network.graph)
    for part in (network.graph, *network.graph.node, *network.graph.value_info):
        del part.metadata_props[:]  # stack traces with the paths of this machine
    onnx.helper.set_model_props(network, texts)
    return network.SerializeToString()


def halve(graph: Any) -> None:
    """Stores the weights that half precision holds exactly as such, in place."""
    from onnx import TensorProto, helper, numpy_helper

    for weight in [x for x in graph.initializer if x.data_type == TensorProto.FLOAT]:
        values = numpy_helper.to_array(weight)
        halved = values.astype("float16")
        if values.size > 64 and (halved == values).all():
            name, stored = weight.name, f"{weight.name}.half"
            weight.CopyFrom(numpy_helper.from_array(halved, stored))
            cast = helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT)
            graph.node.insert(0, cast)


# The model card -----------------------------------------------------------------------------------

CARD = """{title}

An image embedding for retrieval in several fine-grained domains, trained by the reference
implementation of UDON in PyTorch (arXiv:2406.08332): {parameters} M parameters{stored}.
Its outputs are unit vectors of {width} numbers, compared by cosine similarity.

## Use

In that project:

```
python search.py embed {name}.pt DIR --out photos.npz
python search.py find {name}.pt photos.npz PHOTO
```

```python
import search

vectors = search.Embedder("{name}.pt").embed(["a.jpg", "b.jpg"])  # (2, {width}) float32
```

Elsewhere, with a copy of {files}:

```python
import torch
from model import UDON{imported}

student = torch.load("{name}.pt", weights_only=True)
architecture = student["architecture"]
model = UDON({backbone}, **architecture).eval()
model.load_state_dict(student["model"])
vectors = model.embed(images)  # (B, 3, {size}, {size}) float32, normalised -> (B, {width})
```

Without torch, exported to ONNX; this network takes uint8 and normalises it:

```python
import numpy, onnxruntime
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("a.jpg")).convert("RGB")
width, height = (side * {size} // min(image.size) for side in image.size)
left, top = (width - {size}) // 2, (height - {size}) // 2
image = image.resize((width, height), Image.Resampling.{resampling})
image = image.crop((left, top, left + {size}, top + {size}))
images = numpy.asarray(image).transpose(2, 0, 1)[None]  # (B, 3, {size}, {size}) uint8
session = onnxruntime.InferenceSession("{name}.onnx")
(vectors,) = session.run(["vectors"], {{"images": images}})  # (B, {width}) float32
```

Preprocessing: RGB; the short side resized to {size} pixels, {interpolation}, {antialias}; the
central square; values in 0..1, less the mean {mean}, divided by {std}.
`search.py` decodes large JPEG files at 1/2 to 1/8 of their size, which changes vectors slightly.

## Training and results

Options: {options}; step {step:,}. Data: {data}.

{results}

## Limits

- Trained on the domains above alone, on images of {size} x {size} pixels: it is not made for other
  subjects, or for details that vanish at this size.
- A similarity ranks pictures. It is no probability, and a threshold that suits one domain may not
  suit another.
- Every picture has a nearest neighbour, also if nothing in the index resembles it.
- Biases of the training images carry over.

## Licence

{licence}
"""
OPTIONS = ("method", "preset", "model", "init", "freeze_backbone", "batch_size", "ema", "seed")


def card(contents: dict, results: dict | None) -> str:
    """The model card of a student, in which {name} stands for the name of its file without suffix.

    contents  of the exported checkpoint, with the architecture of the one that it comes from
    results   of its test.json, or None
    """
    parameters = sum(weight.numel() for weight in contents["model"].values())
    half = any(weight.dtype == torch.float16 for weight in contents["model"].values())
    architecture, config = contents["architecture"], contents["config"]
    preprocessing, is_timm = contents["preprocessing"], "timm" in architecture["backbone"]
    interpolation = preprocessing.get("interpolation", "bilinear")  # absent from older files
    own = "TimmBackbone(*architecture.pop('backbone').values())"
    given = [f"{x} {config[x]}" for x in OPTIONS if x in config and (config[x] or x == "seed")]
    no_data = "the procedural domains" if "method" in config else "unknown"
    if results is None:
        results = "Test results: none, since there was no test.json of this checkpoint beside it."
    else:
        results = results_table(architecture["classes"], results)
    return CARD.format(
        title=TITLE,
        name="{name}",
        parameters=f"{parameters / 1e6:.2f}",
        stored=", in half precision (the results\nbelow are from before rounding)" if half else "",
        width=architecture["student_dim"],
        size=architecture["backbone"]["image_size"],
        files="`model.py` and `timm_backbone.py`" if is_timm else "`model.py`",
        imported="\nfrom timm_backbone import TimmBackbone" if is_timm else ", ViT",
        backbone=own if is_timm else 'ViT(**architecture.pop("backbone"))',
        resampling=interpolation.upper(),
        interpolation=interpolation,
        antialias="with antialiasing"
        if preprocessing["antialias"]
        else "without antialiasing, which Pillow's\nresize always applies",
        mean=triple(preprocessing["mean"]),
        std=triple(preprocessing["std"]),
        options=plain(", ".join(given)) or "unknown",
        step=contents["step"],
        data=plain(config["data"] or no_data),
        results=results,
        licence=licence(config),
    )


def plain(text: str) -> str:
    """The text with control characters and undecodable bytes of names escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def triple(values) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def results_table(classes: dict[str, int], results: dict) -> str:
    """Classes and images of training, and the results of test.json, as a table in Markdown."""
    lines = [
        f"R@1 and mMP@5 in %, {results['split']} queries, {results['index']} index, beside the "
        "backbone before training at its full width:",
        "",
        "| domain | training classes | images seen | queries | index | R@1 | mMP@5 | backbone: R@1 "
        "| mMP@5 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    backbone = results["backbone"]
    for domain, row in results["domains"].items():
        numbers = (classes[domain], results["images"][domain], row["queries"], row["index"])
        cells = [*(f"{number:,}" for number in numbers), *percentages(row)]
        cells += percentages(backbone["domains"][domain])
        name = plain(domain).replace("|", "\\|")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    means = [*percentages(results["mean"]), *percentages(backbone["mean"])]
    lines.append(f"| mean | | | | | {' | '.join(means)} |")
    return "\n".join(lines)


def percentages(row: dict) -> list[str]:
    return [f"{100 * row[name]:.2f}" for name in ("recall_at_1", "mmp_at_5")]


def licence(config: dict) -> str:
    """What is known about the terms of the weights."""
    init = config.get("init")
    if init == "compact":
        return (
            "For non-commercial research and education only: the backbone started from this "
            "project's\ncompact weights, which were pre-trained on ImageNet images. The terms of "
            "the training images\napply, too."
        )
    if init is None:
        return "That of the authors of the weights, which were not trained here."
    if init == "scratch":
        return "The terms of the training images apply."
    origin = f"timm's weights of {config.get('model')}" if init == "timm" else f"`{plain(init)}`"
    return f"The terms of the initial weights, {origin}, and of the training images apply."
