"""Networks of timm, transformers, open_clip and Flax: the same features here as in each library, on
the same images, with random weights of tiny sizes. Nothing is downloaded. The packages are those
of the extra `interop`; tests of a package that is not installed are skipped."""

import contextlib
import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import checkpoint
import data
import evaluate
import flax_weights
import hubconf
import model
import pretrained
import run
import search
import timm_backbone
import udon
from benchmarks import jax_step
from config import Config, ConfigError
from timm_backbone import TimmBackbone, TimmError

ROOT = Path(__file__).parents[1]
SIZES = dict(image_size=32, patch_size=8, width=48, depth=2, heads=3)
TOLERANCE = 1e-5  # absolute, on features whose entries are about 1


with contextlib.suppress(ImportError):
    timm_backbone.import_torchvision()


def randomise(module, seed=0):
    """Adds noise to every parameter, so that none is 0 or 1; returns the module for inference."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return module.eval()


def random_images(size=32):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def loaded(path, **options):
    """A ViT filled from `path`, its preprocessing and the note about it."""
    vit = model.ViT(**SIZES).eval()
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        preprocessing = pretrained.load(vit, path, **options)
    return vit, preprocessing, " ".join(str(note.message) for note in notes)


def assert_equal_features(backbone, expected, images=None):
    """`expected`: (B, D) of the library for the same images."""
    with torch.inference_mode():
        features = backbone(random_images() if images is None else images)
    assert features.shape == expected.shape
    assert (features - expected).abs().max() < TOLERANCE


# transformers -------------------------------------------------------------------------------------

TEXT = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=50,
    bos_token_id=48,
    eos_token_id=49,
)


def transformers_network(name, **options):
    """(network, function of images -> (B, D) after the final norm) of a class of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192)
    sizes |= dict(image_size=32, patch_size=8) | options
    if name.startswith("ViT"):
        config = transformers.ViTConfig(**sizes)
    elif name == "CLIPModel":
        config = transformers.CLIPConfig(vision_config=sizes, text_config=TEXT)
    else:
        config = transformers.CLIPVisionConfig(**sizes)
    network = randomise(getattr(transformers, name)(config))
    tower = getattr(network, "vit", getattr(network, "vision_model", network))
    if name.startswith("ViT"):
        return network, lambda images: tower(images).last_hidden_state[:, 0]
    return network, lambda images: tower(images).pooler_output


TRANSFORMERS = {
    "ViTModel": {},
    "ViTForImageClassification": dict(hidden_act="gelu_new", layer_norm_eps=1e-3),
    "CLIPVisionModel": {},
    "CLIPVisionModelWithProjection": dict(hidden_act="gelu", layer_norm_eps=1e-3),
    "CLIPModel": dict(hidden_act="gelu"),
}


@pytest.mark.parametrize(
    "container", ["folder", "parts", "index", "bin folder", "safetensors", "state dict"]
)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(tmp_path, name, container):
    """Activation and epsilon come from config.json; a bare state dict has the defaults."""
    options = {} if container == "state dict" else TRANSFORMERS[name]
    network, features = transformers_network(name, **options)
    path = tmp_path
    if container == "state dict":
        path = tmp_path / "weights.pt"
        torch.save(network.state_dict(), path)
    else:
        size = "50KB" if container in ("parts", "index") else "1GB"
        network.save_pretrained(tmp_path, max_shard_size=size)
    if container in ("parts", "index"):
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if container == "index":
        path = tmp_path / "model.safetensors.index.json"
    elif container == "safetensors":
        path = tmp_path / "model.safetensors"
    elif container == "bin folder":
        torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    vit, preprocessing, note = loaded(path)
    with torch.inference_mode():
        assert_equal_features(vit, features(random_images()))
    is_vit = name.startswith("ViT")
    assert preprocessing == (pretrained.HALF if is_vit else pretrained.CLIP)
    assert ("HF ViT" if is_vit else "HF CLIP") in note
    if container != "state dict":
        assert "(config.json), statistics" in note


def test_transformers_statistics_come_from_the_preprocessor(tmp_path):
    network, _ = transformers_network("ViTModel")
    network.save_pretrained(tmp_path)
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    assert loaded(tmp_path)[1] == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")


def refused(path, **options):
    with pytest.raises(pretrained.WeightsError) as caught:
        loaded(path, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_transformers_with_another_number_of_heads_are_refused(tmp_path):
    """The shapes do not tell the number of heads, config.json does."""
    network, _ = transformers_network("CLIPVisionModel", num_attention_heads=4)
    network.save_pretrained(tmp_path)
    assert "4 attention heads" in refused(tmp_path)


def test_transformers_weights_in_parts_of_another_folder_are_refused(tmp_path):
    network, _ = transformers_network("ViTModel")
    network.save_pretrained(tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for name in ("../weights.safetensors", 3, [1], "", "..", "."):
        index.write_text(json.dumps(whole | {"weight_map": {"a": name}}))
        assert "names no files of its folder" in refused(tmp_path)
    for files in ({}, [], None):
        index.write_text(json.dumps(whole | {"weight_map": files}))
        assert "names no files of its folder" in refused(tmp_path)
    index.write_text(json.dumps(whole))
    next(tmp_path.glob("model-00001-*")).unlink()
    assert "its part 'model-00001-" in (message := refused(tmp_path))
    assert "cannot be opened" in message


def test_networks_of_transformers_without_a_cls_token_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192)
    config = transformers.SiglipVisionConfig(**sizes, image_size=32, patch_size=8)
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path)
    assert "no CLS token" in refused(tmp_path)


@pytest.mark.parametrize("eps", [0, 1.5, "1e-5", None])
def test_an_invalid_epsilon_is_refused(tmp_path, eps):
    network, _ = transformers_network("ViTModel")
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": eps}))
    assert "layer_norm_eps" in refused(tmp_path)


# open_clip ----------------------------------------------------------------------------------------


def open_clip_network(vision, **options):
    open_clip_model = pytest.importorskip("open_clip.model")
    text = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    return randomise(open_clip_model.CLIP(16, vision, text, **options))


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("part", ["whole", "tower"])
def test_open_clip(tmp_path, quick_gelu, part):
    vision = dict(image_size=32, patch_size=8, width=48, layers=2, head_width=16)
    network = open_clip_network(vision, quick_gelu=quick_gelu)
    weights = (network if part == "whole" else network.visual).state_dict()
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"vision_cfg": {"width": 48}, "quick_gelu": quick_gelu}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    vit, preprocessing, note = loaded(tmp_path)
    network.visual.proj = None  # the projection into CLIP's joint space is not part of the backbone
    with torch.inference_mode():
        assert_equal_features(vit, network.visual(random_images()))
    assert preprocessing == pretrained.CLIP and "(open_clip_config.json)" in note


TINY_VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


def test_open_clip_around_timm(tmp_path):
    """A timm ViT that reads the CLS token, as the trunk of an open_clip tower."""
    vision = dict(image_size=224, timm_model_name="vit_tiny_patch16_224", timm_proj="linear")
    network = open_clip_network(vision | dict(timm_pool="token"))
    trunk = pytest.importorskip("timm").models.VisionTransformer(num_classes=0, **TINY_VIT)
    network.visual.trunk = randomise(trunk)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    vit, preprocessing, note = loaded(tmp_path / "weights.pt")
    with torch.inference_mode():
        assert_equal_features(vit, trunk(random_images()))
    assert preprocessing == pretrained.CLIP and "clip (assumed)" in note


def test_open_clip_around_timm_with_pooling_is_refused(tmp_path):
    vision_transformer = pytest.importorskip("timm").models.VisionTransformer
    trunk = vision_transformer(num_classes=0, global_pool="map", class_token=False, **TINY_VIT)
    weights = {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    assert "CLS token" in refused(tmp_path / "weights.pt")


# timm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
def test_timm(tmp_path, clip):
    timm = pytest.importorskip("timm")
    norm = functools.partial(nn.LayerNorm, eps=1e-5)
    options = dict(pre_norm=True, norm_layer=norm) if clip else {}
    network = timm.models.VisionTransformer(num_classes=0, **TINY_VIT, **options)
    randomise(network)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    vit, _, note = loaded(tmp_path / "weights.pt")
    with torch.inference_mode():
        assert_equal_features(vit, network(random_images()))
    assert ("timm CLIP" if clip else "timm ViT") in note


# timm models as backbones -------------------------------------------------------------------------

MODELS = ("test_vit", "test_resnet", "test_convnext", "test_mambaout")  # timm's own, tiny
OTHER_SIZE = 96  # theirs is 160


def timm_network(name, **options):
    timm = pytest.importorskip("timm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm, about indexing
        network = timm.create_model(name, **options)
    network = randomise(network)
    for module in network.modules():  # statistics that are not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network


def resized(network, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(network, "set_input_size"):
            network.set_input_size(img_size=size)
    return network


@pytest.mark.parametrize("size", [0, OTHER_SIZE])
@pytest.mark.parametrize("name", MODELS)
def test_any_timm_model_is_a_backbone(tmp_path, name, size):
    """A file with its classifier gives timm's own features, also at another image size."""
    network = timm_network(name)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    backbone = TimmBackbone(name, size).eval()
    preprocessing = pretrained.load(backbone, tmp_path / "weights.pth")
    network.reset_classifier(0)
    settings = network.pretrained_cfg
    assert preprocessing == tuple(settings[x] for x in ("mean", "std", "interpolation"))
    assert backbone.architecture == {"timm": name, "image_size": size or 160}
    images = random_images(size or 160)
    with torch.inference_mode():
        expected = (resized(network, size) if size else network)(images)
    assert_equal_features(backbone, expected, images)
    assert backbone.width == expected.shape[1]


def test_weights_of_the_authors_are_converted_by_timm(tmp_path):
    """DINOv2's own files name the same network with a mask token besides."""
    network = timm_network("test_vit")
    torch.save(network.state_dict() | {"mask_token": torch.zeros(1, 64)}, tmp_path / "weights.pth")
    backbone = TimmBackbone("test_vit").eval()
    pretrained.load(backbone, tmp_path / "weights.pth")
    network.reset_classifier(0)
    with torch.inference_mode():
        assert_equal_features(backbone, network(random_images(160)), random_images(160))


def test_the_trunk_of_an_open_clip_tower_is_loaded_into_a_timm_model(tmp_path):
    network = timm_network("test_convnext", num_classes=0)
    weights = {f"visual.trunk.{key}": value for key, value in network.state_dict().items()}
    weights |= {"visual.head.proj.weight": torch.zeros(8, 64), "logit_scale": torch.zeros(())}
    torch.save(weights, tmp_path / "weights.pth")
    backbone = TimmBackbone("test_convnext").eval()
    preprocessing = pretrained.load(backbone, tmp_path / "weights.pth", statistics="clip")
    assert preprocessing == pretrained.CLIP._replace(interpolation="bicubic")
    with torch.inference_mode():
        assert_equal_features(backbone, network(random_images(160)), random_images(160))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.pop("norm.weight"), ["lacks 1 keys", "norm.weight"]),
        (lambda w: w.update({"blocks.9.gate": torch.ones(3)}), ["has 1 keys", "blocks.9.gate"]),
        (lambda w: w.update({"norm.weight": torch.ones(3)}), ["norm.weight", "(3,)", "(64,)"]),
        (lambda w: w["norm.weight"].fill_(torch.nan), ["norm.weight", "NaN"]),
        (lambda w: w.clear(), ["lacks"]),
    ],
    ids=["missing", "unknown", "shape", "NaN", "empty"],
)
def test_weights_that_do_not_fit_a_timm_model_are_refused(tmp_path, change, words):
    weights = timm_network("test_vit").state_dict()
    change(weights)
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "weights.pth")
    backbone = TimmBackbone("test_vit")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(pretrained.WeightsError) as caught:
        pretrained.load(backbone, tmp_path / "weights.pth")
    assert all(word in str(caught.value) for word in words), caught.value
    after = backbone.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    "name, size, words",
    [
        ("test_vitt", 0, ["timm:test_vitt is unknown", "test_vit"]),
        ("hf-hub:org/model", 0, ["unknown"]),
        ("", 0, ["unknown"]),
        ("resnet18.none", 0, ["timm:resnet18.none", "none"]),
        ("mixer_s32_224", 64, ["64 pixels", "--image-size 224"]),
        ("test_vit", 90, ["90 pixels", "--image-size 160"]),
    ],
)
def test_unusable_timm_models_are_refused(name, size, words):
    pytest.importorskip("timm")
    with pytest.raises(TimmError) as caught:
        TimmBackbone(name, size)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_missing_timm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it raises ImportError
    with pytest.raises(TimmError, match=r"pip install -e '\.\[interop\]'"):
        TimmBackbone("resnet18")


def test_batchnorm_keeps_its_statistics_in_training():
    pytest.importorskip("timm")
    backbone = TimmBackbone("test_resnet").train()
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    images = random_images(160)
    together, alone = backbone(images), backbone(images[:1])
    assert torch.allclose(together[:1], alone, atol=TOLERANCE)
    assert all(torch.equal(value, before[key]) for key, value in backbone.named_buffers())


def test_weights_that_cannot_be_downloaded_are_refused(monkeypatch):
    timm = pytest.importorskip("timm")

    def unreachable(name, **options):
        raise OSError("no network\nat all")

    backbone = TimmBackbone("test_vit")
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(TimmError, match="no network.*--init FILE"):
        backbone.download()


def test_dropout_of_timm_is_off_in_training():
    pytest.importorskip("timm")
    backbone, images = TimmBackbone("ghostnet_050", 32).train(), torch.rand(2, 3, 32, 32)
    assert backbone.network.drop_rate > 0
    assert torch.equal(backbone(images), backbone(images))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_activations_of_timm_computed_again_change_no_gradient(name):
    pytest.importorskip("timm")
    backbone, images = TimmBackbone(name, 160).train(), torch.rand(2, 3, 160, 160)
    counts, gradients = [], []

    def kept(tensor):
        counts[-1] += 1
        return tensor

    for again in (False, True):
        backbone.set_grad_checkpointing(again)
        counts.append(0)
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            backbone(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in backbone.parameters()])
        backbone.zero_grad()
    assert counts[1] < 0.7 * counts[0]
    for one, other in zip(*gradients):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_timm_beside_the_torchvision_that_pip_installs():
    """In a process that has not prepared the import of torchvision, as this one has."""
    pytest.importorskip("timm")
    code = "import timm_backbone; print(timm_backbone.TimmBackbone('test_vit').width)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("64\n", "")


def test_a_run_with_a_timm_model(tmp_path, uned):
    """Trained, resumed, evaluated from its checkpoint, and the start of another run."""
    pytest.importorskip("timm")
    out, best = str(tmp_path / "run"), tmp_path / "run" / "best.pt"
    model_options = ["--model", "timm:test_resnet", "--image-size", "32", "--init", "scratch"]
    options = ["--data", str(uned), "--batch-size", "8", "--save-every", "1", "--val-every", "100"]
    udon.main(["train", *model_options, *options, "--steps", "2", "--out", out])
    contents = checkpoint.load(best)[1]
    assert contents["architecture"]["backbone"] == {"timm": "test_resnet", "image_size": 32}
    assert tuple(contents["preprocessing"]["mean"]) == (0.5, 0.5, 0.5)
    evaluate.main([str(best), "--data", str(uned), "--json", str(tmp_path / "again.json")])
    files = [tmp_path / "run" / "test.json", tmp_path / "again.json"]
    first, second = (json.loads(file.read_text())["mean"] for file in files)
    assert first == second
    udon.main(["train", "--resume", "--steps", "3", "--out", out])
    backbone = TimmBackbone("test_resnet", 32)
    pretrained.load(backbone, best)
    trained = checkpoint.load(best)[0].backbone.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in backbone.state_dict().items())


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path):
    """Its activation or its normalisation would be another; and one of unknown interpolation."""
    pytest.importorskip("timm")
    vit = model.ViT(**SIZES)
    weights = {f"backbone.{key}": value for key, value in vit.state_dict().items()}
    odd = pretrained.HALF._replace(interpolation="nearest")._asdict()
    for backbone in (vit.architecture, {"timm": "test_vit"}):
        content = {"architecture": {"backbone": backbone}, "preprocessing": odd}
        torch.save({"model": weights, **content}, tmp_path / "best.pt")
        with pytest.raises(pretrained.WeightsError, match="timm:test_vit as its backbone"):
            pretrained.load(TimmBackbone("test_vit"), tmp_path / "best.pt")


BICUBIC = Config(preset="mini", model="timm:test_vit", init="scratch", image_size=64)


@pytest.mark.parametrize(
    "name, interpolation",
    [("test_vit", "bicubic"), ("test_byobnet", "bicubic"), ("test_resnet", "bilinear")],
)
def test_test_images_are_those_of_timms_transform(name, interpolation):
    timm_data = pytest.importorskip("timm.data")
    backbone = TimmBackbone(name)
    settings = timm_data.resolve_data_config(pretrained_cfg=backbone.network.pretrained_cfg)
    settings |= {"input_size": (3, 64, 64), "crop_pct": 1.0}  # without a margin
    transform = timm_data.create_transform(**settings)
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    options = dataclasses.replace(BICUBIC, model=f"timm:{name}")
    preprocessing = run.build_model(options, {"a": 3})[2]
    assert preprocessing["interpolation"] == interpolation
    ours = data.prepare_test(Image.fromarray(pixels), 64, **data.resizing(preprocessing))
    ours = torch.tensor(ours).permute(2, 0, 1)[None]
    ours = data.normalise(ours, preprocessing["mean"], preprocessing["std"])[0]
    assert (ours - transform(Image.fromarray(pixels))).abs().max() < TOLERANCE


def test_a_timm_model_keeps_its_interpolation(capsys):
    """Whatever the statistics; it is refused without antialiasing, and needs no note."""
    pytest.importorskip("timm")
    options = dataclasses.replace(BICUBIC, init_statistics="imagenet")
    udon_model, architecture, preprocessing = run.build_model(options, {"a": 3})
    assert "note" not in capsys.readouterr().out
    assert preprocessing == {
        **pretrained.IMAGENET._asdict(),
        "interpolation": "bicubic",
        "antialias": True,
    }
    again = checkpoint.build(architecture)
    again.load_state_dict(udon_model.state_dict())
    with pytest.raises(ConfigError, match="--no-antialias .*timm:test_vit with bicubic"):
        run.build_model(dataclasses.replace(BICUBIC, antialias=False), {"a": 3})


def test_an_interpolation_that_is_not_supported_is_noted():
    pytest.importorskip("timm")
    backbone = TimmBackbone("test_vit", 64)
    backbone.network.pretrained_cfg = backbone.network.pretrained_cfg | {"interpolation": "random"}
    with pytest.warns(UserWarning, match="test_vit with random interpolation, here .* bicubic"):
        assert run.load_initial_weights(backbone, BICUBIC).interpolation == "bicubic"


@pytest.fixture
def methods(monkeypatch):
    """take() -> the interpolations with which Pillow has resized images since the last time."""
    found, resize = set(), Image.Image.resize

    def recorded(image, size, resample=None, **options):
        found.add(resample)
        return resize(image, size, resample, **options)

    def take():
        taken = {*found}
        found.clear()
        return taken

    monkeypatch.setattr(Image.Image, "resize", recorded)
    return take


@pytest.mark.parametrize("kind", [["--min-area", "0.5"], ["--freeze-backbone", "--views", "2"]])
def test_the_interpolation_of_a_run_is_used_everywhere(tmp_path, uned, methods, kind):
    """Training, its evaluation and its start from images; evaluate.py, search.py, hubconf.py; and
    the run as an older version wrote it, which is bilinear and stays so."""
    pytest.importorskip("timm")
    out, best = str(tmp_path / "run"), tmp_path / "run" / "best.pt"
    options = ["--model", "timm:test_vit", "--image-size", "32", "--init", "scratch", *kind]
    options += ["--data", str(uned), "--batch-size", "8", "--val-every", "100", "--workers", "0"]
    options += ["--student-init", "pca", "--student-dim", "16", "--device", "cpu"]
    udon.main(["train", *options, "--steps", "1", "--out", out])
    for name in ("bicubic", "bilinear"):
        method = {Image.Resampling[name.upper()]}
        if name == "bicubic":
            assert checkpoint.load(best)[1]["preprocessing"]["interpolation"] == name
        else:
            methods()
            for file in (best, best.with_name("last.pt")):
                contents = checkpoint.read(file)
                del contents["preprocessing"]["interpolation"]
                checkpoint.save(file, contents)
            shutil.rmtree(tmp_path / "run" / "features", ignore_errors=True)
            udon.main(["train", "--resume", "--steps", "2", "--out", out])
            assert "interpolation" not in checkpoint.load(best)[1]["preprocessing"]
        assert methods() == method, "training"
        evaluate.main([str(best), "--data", str(uned)])
        assert methods() == method, "evaluate.py"
        folder, index = uned / "images" / "cars" / "val", tmp_path / f"{name}.npz"
        search.main(["embed", str(best), str(folder), "--out", str(index)])
        assert methods() == method, "search.py"
        hubconf.udon(best, "cpu")[1](np.zeros((60, 80, 3), np.uint8))
        assert methods() == method, "hubconf.py"
        card = checkpoint.export(best, tmp_path / f"{name}.pt").read_text()
        assert f"Resampling.{name.upper()})" in card and f"pixels, {name}, with" in card
        search.Embedder(tmp_path / f"{name}.pt", "cpu").embed(np.zeros((1, 60, 80, 3), np.uint8))
        assert methods() == method, "the exported student"
        found = pretrained.load(TimmBackbone("test_vit", 32), best)
        assert found.interpolation == name, "another run that starts from it"


# official checkpoints, written by Flax ------------------------------------------------------------

CLASSES = {"birds": 7, "cars": 5}  # training classes
STUDENT = "universal_student_projection_domain_0"
UDON_HEADS = {STUDENT: ("backbone", 8)}  # name in the official code: input and output width
for NUMBER, COUNT in enumerate(CLASSES.values()):
    TEACHER = f"teacher_projection_domain_{NUMBER}"
    UDON_HEADS[f"universal_student_output_projection_{NUMBER}"] = (STUDENT, COUNT)
    UDON_HEADS[TEACHER] = ("backbone", 16)
    UDON_HEADS[f"teacher_output_projection_{NUMBER}"] = (TEACHER, COUNT)
UNED_HEADS = {
    "projection": ("backbone", 8),
    "output_projection_0": ("projection", 7),
    "output_projection_1": ("projection", 5),
}
JOINT_HEADS = {"projection": ("backbone", 8), "output_projection_0": ("projection", 12)}


def flax_backbone(clip):
    """The backbone of the official code as a module of Flax, images (B, H, W, 3) -> (B, D)."""
    linen, jnp = pytest.importorskip("flax.linen"), pytest.importorskip("jax.numpy")
    norm = functools.partial(linen.LayerNorm, epsilon=1e-5 if clip else 1e-6)
    zeros, conv = linen.initializers.zeros, functools.partial(linen.Conv, 48, (8, 8), strides=8)
    norm1, attention, norm2, mlp, fc1, fc2 = (
        ("ln_1", "attn", "ln_2", "mlp", "c_fc", "c_proj")
        if clip
        else ("LayerNorm_0", "MultiHeadDotProductAttention_0")
        + ("LayerNorm_1", "MlpBlock_0", "Dense_0", "Dense_1")
    )

    class Mlp(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(192, name=fc1)(x)
            x = x * linen.sigmoid(1.702 * x) if clip else linen.gelu(x)
            return linen.Dense(48, name=fc2)(x)

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            y = norm(name=norm1)(x)
            x = x + linen.MultiHeadDotProductAttention(3, name=attention)(y, y)
            return x + Mlp(name=mlp)(norm(name=norm2)(x))

    class Table(linen.Module):
        @linen.compact
        def __call__(self, x):
            return x + self.param("pos_embedding", zeros, (1, *x.shape[1:]))

    class Encoder(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = x if clip else Table(name="posembed_input")(x)
            for i in range(2):
                x = Block(name=f"resblocks.{i}" if clip else f"encoderblock_{i}")(x)
            return x if clip else norm(name="encoder_norm")(x)

    class Backbone(linen.Module):
        @linen.compact
        def __call__(self, images):
            patches = conv(name="conv1" if clip else "embedding", use_bias=not clip)(images)
            patches = patches.reshape(len(images), -1, 48)
            name, shape = ("class_embedding", (48,)) if clip else ("cls", (1, 1, 48))
            cls = jnp.broadcast_to(self.param(name, zeros, shape), (len(images), 1, 48))
            x = jnp.concatenate([cls, patches], axis=1)
            if clip:
                x = x + self.param("positional_embedding", zeros, x.shape[1:])
                x = norm(name="ln_pre")(x)
            x = Encoder(name="transformer" if clip else "Transformer")(x)
            return (norm(name="ln_post")(x) if clip else x)[:, 0]

    return Backbone()


@functools.cache
def flax_features(clip):
    """(random params as nested dicts, features (3, 48) of random_images())."""
    jax = pytest.importorskip("jax")
    images = jax.numpy.asarray(random_images().numpy().transpose(0, 2, 3, 1))
    backbone, rng = flax_backbone(clip), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.asarray(x + rng.normal(0, 0.1, x.shape), np.float32),
        backbone.init(jax.random.key(0), images)["params"],
    )
    return params, np.asarray(jax.jit(backbone.apply)({"params": params}, images))


def unit(x, axis):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def flax_network(clip, heads):
    """(params with random heads, {name: unit embeddings or cosines of a head})."""
    params, features = flax_features(clip)
    params, outputs = dict(params), {"backbone": unit(features, 1)}
    rng = np.random.default_rng(1)
    for name, (source, width) in heads.items():
        inputs = outputs[source]
        kernel = rng.normal(0, 0.3, (inputs.shape[1], width)).astype(np.float32)
        if "output" in name:
            params[name] = {"kernel": kernel}
            outputs[name] = inputs @ unit(kernel, 0)
        else:
            bias = rng.normal(0, 0.1, width).astype(np.float32)
            dense = {"kernel": kernel, "bias": bias}
            params[name] = {"Dense_0": dense} if "domain" in name else dense
            outputs[name] = unit(inputs @ kernel + bias, 1)
    return params, outputs


def save_state(folder, params):
    """Writes params within a training state as the official code does; returns the path."""
    flax, optax = pytest.importorskip("flax"), pytest.importorskip("optax")
    training = pytest.importorskip("flax.training.checkpoints")
    flax.config.update("flax_use_orbax_checkpointing", False)
    state = {
        "opt_state": optax.adamw(1e-3).init(params),
        "params": params,
        "global_step": np.int32(34),
        "model_state": {},
        "rng": np.zeros(2, np.uint32),
        "metadata": {"chrono": {"start": 1.5, "note": "", "steps": None}},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this format is deprecated
        return training.save_checkpoint(folder, state, 34, overwrite=True)


def converted(path, **options):
    network, contents = flax_weights.load(path, **options)
    assert not network.training
    return network, contents


@pytest.mark.parametrize("clip", [False, True], ids=["AugReg", "CLIP"])
def test_official_udon(tmp_path, clip):
    """Embeddings of student and teachers and all cosines equal those of the official layout."""
    params, expected = flax_network(clip, UDON_HEADS)
    path = save_state(tmp_path, params)
    network, contents = converted(path, domains=list(CLASSES))
    assert contents["architecture"]["classes"] == CLASSES and contents["step"] == 34
    statistics = pretrained.CLIP if clip else pretrained.HALF
    assert contents["preprocessing"] == {**statistics._asdict(), "antialias": False}
    for number, domain in enumerate(CLASSES):
        with torch.inference_mode():
            outputs = network(random_images(), domain)
        names = {
            "backbone": "backbone",
            "student": STUDENT,
            "teacher": f"teacher_projection_domain_{number}",
            "student_cosines": f"universal_student_output_projection_{number}",
            "teacher_cosines": f"teacher_output_projection_{number}",
        }
        for field, name in names.items():
            actual = getattr(outputs, field).numpy()
            assert actual.shape == expected[name].shape, field
            assert np.abs(actual - expected[name]).max() < TOLERANCE, field


@pytest.mark.parametrize("heads, classes", [(UNED_HEADS, CLASSES), (JOINT_HEADS, {"joint": 12})])
def test_official_uned(tmp_path, heads, classes):
    """A student alone, with a classifier per domain or one joint classifier."""
    params, expected = flax_network(False, heads)
    path = save_state(tmp_path, params)
    (tmp_path / "config.json").write_text(json.dumps({"dataset_name": "birds,cars"}))
    network, contents = converted(path)
    assert contents["architecture"]["classes"] == classes
    assert contents["architecture"]["teacher_dim"] == 0
    with torch.inference_mode():
        outputs = network(random_images(), [*classes][-1])
    name = f"output_projection_{len(classes) - 1}"
    assert np.abs(outputs.student.numpy() - expected["projection"]).max() < TOLERANCE
    assert np.abs(outputs.student_cosines.numpy() - expected[name]).max() < TOLERANCE


def test_domains_of_uned_are_known_by_their_classes(tmp_path):
    heads = {"projection": ("backbone", 8), "output_projection_0": ("projection", 900)}
    heads["output_projection_1"] = ("projection", 78)
    path = save_state(tmp_path, flax_network(False, heads)[0])
    classes = converted(path)[1]["architecture"]["classes"]
    assert list(classes.items()) == [("food2k", 900), ("cars", 78)]


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {"optimizer": {"target": {"params": p}}}])
def test_parameters_alone_and_older_states_are_read(tmp_path, wrap):
    serialization = pytest.importorskip("flax.serialization")
    params, expected = flax_network(False, UDON_HEADS)
    (tmp_path / "model").write_bytes(serialization.to_bytes(wrap(params)))
    network = converted(tmp_path / "model", domains=["a", "b"])[0]
    with torch.inference_mode():
        student = network.embed(random_images()).numpy()
    assert np.abs(student - expected[STUDENT]).max() < TOLERANCE


def test_chunks_and_half_types_are_read(tmp_path, monkeypatch):
    """Flax stores arrays of more than 2^30 bytes in chunks; here it does so from 1,000 bytes."""
    serialization = pytest.importorskip("flax.serialization")
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)
    params, _ = flax_network(False, UDON_HEADS)
    params["cls"] = pytest.importorskip("jax.numpy").asarray(params["cls"], "bfloat16")
    (tmp_path / "model").write_bytes(serialization.to_bytes({"params": params}))
    network = converted(tmp_path / "model", domains=["a", "b"])[0]
    kernel = params["universal_student_output_projection_0"]["kernel"]
    assert torch.equal(network.student_classifiers["a"].weight, torch.from_numpy(kernel.T))
    assert torch.equal(network.backbone.cls_token.flatten(), as_float(params["cls"]))


def as_float(array):
    return torch.from_numpy(np.asarray(array, np.float32).flatten())


def test_an_official_checkpoint_is_evaluated_and_starts_a_run(tmp_path, uned, capsys):
    params, expected = flax_network(True, UDON_HEADS)
    path, target = save_state(tmp_path, params), str(tmp_path / "udon.pt")
    flax_weights.main([path, target, *CLASSES])
    assert "birds 7, cars 5" in capsys.readouterr().out
    evaluate.main([target, "--data", str(uned), "--json", str(tmp_path / "out.json")])
    assert set(json.loads((tmp_path / "out.json").read_text())["domains"]) == set(CLASSES)
    vit, preprocessing, note = loaded(target)
    assert (preprocessing, note) == (pretrained.CLIP, "")
    with torch.inference_mode():
        features = unit(vit(random_images()).numpy(), 1)
    assert np.abs(features - expected["backbone"]).max() < TOLERANCE


def without(params, *keys):
    """A copy of nested dicts without params[key][key]..."""
    first, *rest = keys
    if not rest:
        return {key: value for key, value in params.items() if key != first}
    return params | {first: without(params[first], *rest)}


BLOCK = ("Transformer", "encoderblock_1")
DENSE = {"kernel": np.ones((8, 8), np.float32), "bias": np.ones(8, np.float32)}
CHANGES = {
    "unknown head": (lambda p: p | {"distance_head": DENSE}, "distance_head/kernel"),
    "MLP head": (lambda p: p | {STUDENT: p[STUDENT] | {"Dense_1": DENSE}}, f"{STUDENT}/Dense_1"),
    "no student": (lambda p: without(p, STUDENT), "no student head"),
    "no bias": (lambda p: without(p, STUDENT, "Dense_0", "bias"), "student_head"),
    "no teacher": (lambda p: without(p, TEACHER), "teacher_heads of domain 1"),
    "no classifier": (
        lambda p: without(p, "universal_student_output_projection_0"),
        "student classifiers of the domains [1]",
    ),
    "teacher's width": (
        lambda p: p | {"teacher_output_projection_0": {"kernel": DENSE["kernel"]}},
        "teacher_classifiers of domain 0",
    ),
    "no CLS token": (lambda p: without(p, "cls"), "CLS token"),
    "no table": (lambda p: without(p, "Transformer", "posembed_input"), "pos_embed"),
    "no query": (lambda p: without(p, *BLOCK, "MultiHeadDotProductAttention_0", "query"), "qkv"),
    "unknown block": (
        lambda p: p | {"Transformer": p["Transformer"] | {"gate": DENSE}},
        "Transformer.gate",
    ),
    "no backbone": (lambda p: {k: v for k, v in p.items() if "projection" in k}, "no backbone"),
    "NaN": (lambda p: p | {"cls": p["cls"] * np.nan}, "cls"),
    "number": (lambda p: p | {"cls": 3}, "cls is no array"),
    "integers": (lambda p: p | {"cls": np.ones((1, 1, 48), np.int32)}, "cls"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_official_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path, kind):
    change, words = CHANGES[kind]
    params = change(flax_network(False, UDON_HEADS)[0])
    path = save_state(tmp_path, params)
    with pytest.raises(pretrained.WeightsError) as caught:
        flax_weights.load(path, ["a", "b"])
    message = str(caught.value)
    assert words in message and path in message and message.isprintable(), message


@pytest.mark.parametrize(
    "domains, words", [(None, "7 classes"), (["a"], "2 classifiers"), (["a", "a"], "different")]
)
def test_domains_must_be_named(tmp_path, domains, words):
    path = save_state(tmp_path, flax_network(False, UDON_HEADS)[0])
    with pytest.raises(pretrained.WeightsError, match=words):
        flax_weights.load(path, domains)


@pytest.mark.parametrize("content", [b"", b"\x00", b"\x93\x01\x02\x03", b"text", b"\x81\xa1a\xc1"])
def test_other_files_are_refused(tmp_path, content, capsys):
    pytest.importorskip("msgpack")
    (tmp_path / "file").write_bytes(content)
    for arguments in ([str(tmp_path / "file"), "x.pt"], [str(tmp_path), "x.pt"], ["none", "x.pt"]):
        with pytest.raises(SystemExit) as stop:
            flax_weights.main(arguments)
        assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_a_cut_file_is_refused(tmp_path):
    path = save_state(tmp_path, flax_network(False, UDON_HEADS)[0])
    content = (tmp_path / path).read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "cut").write_bytes(content[: int(share * len(content))])
        with pytest.raises(pretrained.WeightsError, match="damaged"):
            flax_weights.load(tmp_path / "cut")


def test_a_missing_msgpack_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(pretrained.WeightsError, match=r"pip install -e '\.\[interop\]'"):
        flax_weights.load(tmp_path / "checkpoint_34")


# The step in JAX ----------------------------------------------------------------------------------


def test_the_step_in_jax_is_ours(monkeypatch):
    """Losses and gradients; with flat tokens, the weights after steps in two domains."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    jax = pytest.importorskip("jax")
    jax_udon = pytest.importorskip("benchmarks.jax_udon")
    torch.manual_seed(0)
    classes = {"cars": 7, "met": 40}
    network = model.UDON(model.ViT(32, 16, 48, 1, 3), classes, student_dim=8, teacher_dim=12)
    options = dict(image_size=32, batch_size=6, inactive_heads="zero", frozen_epochs=0.0)
    ours = jax_step.new_run(network, Config(**options, backbone_lr=1e-3, weight_decay=1e-2))
    theirs = jax_step.JaxRun(ours)
    batches = {d: jax_step.random_batch(ours.config, count) for d, count in classes.items()}
    pixels, labels = batches["cars"]
    images = data.normalise(pixels, (0.5,) * 3, (0.5,) * 3)
    arrays = images.permute(0, 2, 3, 1).numpy(), labels.numpy()
    gradients_of = jax.jit(jax.grad(jax_udon.losses, has_aux=True), static_argnums=(3, 4))
    gradients, losses = gradients_of(theirs.parameters, *arrays, "cars", 3)
    expected = udon.compute_losses(network, images, labels, "cars")
    expected.total.backward()
    values = [value.item() for value in expected]
    assert [value.item() for value in losses] == pytest.approx(values, rel=1e-5)
    for name, gradient in jax_udon.to_torch(gradients).items():
        own = network.get_parameter(name).grad
        own = np.zeros_like(gradient) if own is None else own.numpy()
        assert abs(gradient - own).max() <= 1e-5 * abs(own).max(), name
    network.zero_grad()
    for domain in 2 * list(classes):
        values = udon.training_step(ours, iter([(domain, *batches[domain])]))[1]._asdict()
        found = theirs.step("JAX, flat tokens", domain, batches[domain])
        assert found == pytest.approx(values, rel=1e-4)
    for name, weights in jax_udon.to_torch(theirs.parameters).items():
        difference = abs(weights - network.get_parameter(name).detach().numpy())
        if name.endswith("qkv.bias"):  # AdamW enlarges the gradient of keys' biases, which is 0
            difference = difference[2 * len(difference) // 3 :]
        assert difference.max() < 1e-4, name
