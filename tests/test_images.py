"""images.py: files as a viewer shows them, bad files, transforms against independent arithmetic."""

import io
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, features

import images

REDUCED_TOLERANCE = 8, 1.0  # levels of 255, largest and mean, of a JPEG decoded at a reduced scale
THIN_MEMORY = 300  # MB for a picture of 20,000 x 1


def saved(path, image, **options):
    image.save(path, **options)
    return images.open_image(path)


def photo(width, height, seed=0):
    """A picture with the spectrum of photographs, 1 / frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    noise = rng.normal(size=(3, height, width)) + 1j * rng.normal(size=(3, height, width))
    levels = np.fft.ifft2(noise / frequency**1.2).real.transpose(1, 2, 0)
    levels = (levels - levels.min()) / (levels.max() - levels.min())
    return Image.fromarray((255 * levels).astype(np.uint8))


def levels(image):
    return np.asarray(image).astype(int)


# Opening ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    """A red mark in the upper left corner of the upright picture stays there."""
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    method = inverse.get(orientation, images.TRANSPOSITIONS.get(orientation))
    stored = upright if method is None else upright.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = saved(tmp_path / f"a.{suffix}", stored, exif=exif)
    assert opened.size == (64, 32)
    red, white = levels(opened)[4, 4], levels(opened)[28, 60]
    assert red[0] > 200 and red[1:].max() < 60 and white.min() > 200


def test_damaged_exif_counts_as_none(tmp_path):
    file = tmp_path / "a.jpg"
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff broken"
    Image.new("RGB", (8, 4)).save(file, exif=exif)
    assert images.open_image(file).size == (8, 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "L", "RGB", "I;16"])
def test_transparency_is_white(tmp_path, mode):
    """A black disc; around it black pixels that are transparent."""
    alpha = Image.new("L", (64, 64))
    ImageDraw.Draw(alpha).ellipse((10, 10, 54, 54), fill=255)
    options = {}
    if mode in ("RGBA", "LA"):
        picture = Image.new(mode[:-1], (64, 64))
        picture.putalpha(alpha)
    elif mode == "I;16":
        picture = Image.fromarray(np.where(alpha, 0, 7).astype(np.uint16))
        options["transparency"] = 7
    else:  # the colour of the surroundings is the transparent one
        dark = alpha.point(lambda level: 0 if level else 255 if mode == "1" else 9)
        picture = dark.convert(mode)
        transparent = picture.getpixel((0, 0))
        options["transparency"] = transparent
    pixels = levels(saved(tmp_path / "a.png", picture, **options))
    assert pixels.shape == (64, 64, 3)
    assert pixels[0, 0].min() == 255 and pixels[32, 32].max() == 0


@pytest.mark.parametrize(
    "dtype, top, suffix",
    [
        (np.uint16, 65535, "png"),
        (np.uint16, 65535, "tif"),
        (np.uint16, 65535, "pgm"),
        (np.int32, 65535, "tif"),
        (np.int32, 2**31 - 1, "tif"),
        (np.float32, 1, "tif"),
    ],
)
def test_deep_grey_is_scaled_by_its_range(tmp_path, dtype, top, suffix):
    ramp = np.tile(np.linspace(0, top, 64), (4, 1)).astype(dtype)
    pixels = levels(saved(tmp_path / f"a.{suffix}", Image.fromarray(ramp)))
    assert abs(pixels[0, :, 0] - np.linspace(0, 255, 64)).max() <= 1
    assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize("value", [1.5, -0.5, np.nan, np.inf])
def test_floats_out_of_range_are_refused(tmp_path, value):
    pixels = np.full((4, 4), 0.5, dtype=np.float32)
    pixels[1, 2] = value
    with pytest.raises(images.InputError, match="a.tif has pixels from .* 0 to 1"):
        saved(tmp_path / "a.tif", Image.fromarray(pixels))


@pytest.mark.parametrize(
    "mode, suffix", [("P", "png"), ("CMYK", "tif"), ("CMYK", "jpg"), ("YCbCr", "jpg"), ("L", "gif")]
)
def test_modes_become_rgb(tmp_path, mode, suffix):
    colour = (204, 204, 204) if mode == "L" else (204, 0, 51)
    opened = saved(tmp_path / f"a.{suffix}", Image.new("RGB", (9, 5), colour).convert(mode))
    assert opened.mode == "RGB" and opened.size == (9, 5)
    assert abs(levels(opened) - colour).max() < 12


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_is_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    opened = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    assert abs(levels(opened) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("suffix", images.SUFFIXES)
def test_every_suffix_can_be_opened(tmp_path, suffix):
    formats = [name for name, suffixes in images.FORMATS.items() if suffix in suffixes]
    Image.new("RGB", (32, 16), (0, 200, 0)).save(tmp_path / f"a{suffix}", format=formats[0])
    assert abs(levels(images.open_image(tmp_path / f"a{suffix}")) - (0, 200, 0)).max() < 12


def test_suffixes_are_those_of_this_pillow():
    assert {".jpg", ".jfif", ".png", ".webp", ".tif"} <= set(images.SUFFIXES)
    assert (".avif" in images.SUFFIXES) == features.check("avif")
    assert not {".eps", ".ps", ".wmf", ".emf", ".pdf", ".fits", ".h5"} & set(images.SUFFIXES)


# Bad files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["EPS", "PDF", "PCX", "ICO", "TGA"])
def test_other_formats_are_refused_whatever_the_name(tmp_path, monkeypatch, form):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.jpg", format=form)
    with pytest.raises(images.InputError, match="a.jpg cannot be read .it is none of JPEG, PNG"):
        images.open_image(tmp_path / "a.jpg")
    assert not (tmp_path / "started").exists()


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "directory.jpg").mkdir()
    for file in (tmp_path / "fifo.jpg", tmp_path / "directory.jpg", "/dev/zero"):
        with pytest.raises(images.InputError, match=f"{file} is not a regular file"):
            images.open_image(file)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp", "ppm", "jp2"])
def test_damaged_files_are_a_sentence(tmp_path, suffix):
    """Truncated anywhere, or with damaged bytes: opened or refused, without a warning."""
    buffer = io.BytesIO()
    form = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(suffix, suffix.upper())
    photo(40, 30).save(buffer, format=form)
    raw, rng, refused = buffer.getvalue(), np.random.default_rng(0), 0
    file = tmp_path / f"a.{suffix}"
    for trial in range(60):
        damaged = bytearray(raw)
        if trial % 2:
            del damaged[int(rng.integers(len(raw))) :]
        else:
            for place in rng.integers(0, len(raw), 3):
                damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                assert images.open_image(file).mode == "RGB"
            except images.InputError as error:
                refused += 1
                assert f"a.{suffix}" in str(error) and "\n" not in str(error)
    assert refused > 10, f"{refused} of 60 refused"


def test_large_images(tmp_path, monkeypatch):
    file = tmp_path / "large.png"
    Image.new("RGB", (300, 100)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(images.InputError, match="large.png .*20,000 pixels.*UDON_MAX_PIXELS=N"):
        images.open_image(file)
    monkeypatch.setenv("UDON_MAX_PIXELS", "30000")
    assert images.open_image(file).size == (300, 100)
    monkeypatch.setenv("UDON_MAX_PIXELS", "many")
    with pytest.raises(images.InputError, match="UDON_MAX_PIXELS is 'many'"):
        images.open_image(file)


def test_out_of_memory_is_a_sentence(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(images.InputError, match="a.png .* needs more memory than there is"):
        images.open_image(tmp_path / "a.png")


def test_messages_are_printable_whatever_the_name():
    message = str(images.InputError(f"image {os.fsdecode(b'x' + bytes([255, 10]))}.png"))
    assert message == "image x\\udcff\\n.png"


# Transforms ---------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(4, 48))
def test_prepared_shapes(width, height, size):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )
    assert images.prepare_train(image, size).shape == (round(size * 8 / 7),) * 2 + (3,)
    for antialias in (True, False):
        assert images.prepare_test(image, size, antialias).shape == (size, size, 3)


def test_training_side_of_the_paper():
    assert images.train_side(224) == 256


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    "width, height, left, top, scaled",
    [(60, 40, 4, 0, (24, 16)), (40, 61, 0, 4, (16, 24)), (16, 16, 0, 0, (16, 16))],
)
def test_centre_crop(width, height, left, top, scaled, interpolation):
    """Short side to 16, other side int(ratio x 16), then the centre with floored offset. Training
    images are resized with the same interpolation."""
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )
    method, how = Image.Resampling[interpolation.upper()], {"interpolation": interpolation}
    whole = np.asarray(image.resize(scaled, method))
    assert (images.prepare_test(image, 16, **how) == whole[top : top + 16, left : left + 16]).all()
    assert (
        images.prepare_train(image, 14, **how) == np.asarray(image.resize((16, 16), method))
    ).all()


@settings(max_examples=40)
@given(width=st.integers(2, 60), height=st.integers(2, 60), side=st.integers(2, 60))
def test_resize_without_antialias_is_half_pixel_bilinear(width, height, side):
    """TensorFlow's bilinear resize: output pixel i samples (i + 1/2) x ratio - 1/2, clamped."""
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)

    def sampling(old):
        """(side, old) weights of the old pixels in each new one."""
        at = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
        return np.clip(1 - abs(at[:, None] - np.arange(old)), 0, None)

    exact = np.einsum("ih,jw,hwc->ijc", sampling(height), sampling(width), pixels.astype(float))
    error = abs(images.resize(Image.fromarray(pixels), side, side, antialias=False) - exact).max()
    assert error < 0.501, f"{error} levels, more than rounding"


def test_resize_with_antialias_is_torchs():
    pixels = np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    ours = images.resize(Image.fromarray(pixels), 20, 24).astype(float)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    theirs = (
        F.interpolate(tensor, (24, 20), mode="bilinear", antialias=True, align_corners=False)[0]
        .permute(1, 2, 0)
        .numpy()
    )
    assert abs(ours - theirs).max() <= 1.0


def test_preprocessing_that_does_not_tell_the_interpolation_is_bilinear():
    older = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "antialias": False}
    assert images.resizing(older) == {"antialias": False, "interpolation": "bilinear"}
    stated = {"antialias": True, "interpolation": "bicubic"}
    assert images.resizing(older | stated) == stated


def test_normalise():
    batch = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.5, 0.1)
    expected = (batch.numpy().astype(np.float64) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(
        std, (3, 1, 1)
    )
    assert np.allclose(images.normalise(batch, mean, std).numpy(), expected, atol=1e-6)


# Size of the output, not of the input -------------------------------------------------------------


@pytest.mark.parametrize(
    "antialias, interpolation", [(True, "bilinear"), (True, "bicubic"), (False, "bilinear")]
)
@pytest.mark.parametrize("width, height", [(700, 5), (5, 700), (2000, 16), (65, 1000)])
def test_thin_images_are_cropped_before_they_are_resized(width, height, antialias, interpolation):
    """The same pixels, within a level, as of the whole image resized and then cropped."""
    image, size = photo(width, height), 16
    scaled = [max(size, int(side * size / min(width, height))) for side in (width, height)]
    left, top = ((side - size) // 2 for side in scaled)
    how = {"antialias": antialias, "interpolation": interpolation}
    whole = images.resize(image, *scaled, **how).astype(int)[top : top + size]
    error = abs(images.prepare_test(image, size, **how) - whole[:, left : left + size])
    assert error.max() <= 1, f"{error.max()} levels"


def test_a_thin_image_takes_little_memory():
    code = f"""
import resource, images
from PIL import Image
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
for antialias in (True, False): images.prepare_test(Image.new("RGB", (20000, 1)), 224, antialias)
assert peak() - before < {THIN_MEMORY}, peak() - before
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(images.__file__))


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("width, height, reduced", [(800, 600, 4), (803, 601, 4), (401, 603, 2)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_jpegs_are_decoded_at_a_reduced_scale(
    tmp_path, width, height, reduced, orientation, interpolation
):
    exif, size, file = Image.Exif(), 112, tmp_path / "a.jpg"
    exif[0x0112] = orientation
    photo(width, height).save(file, exif=exif, quality=90)
    whole, how = images.open_image(file), {"interpolation": interpolation}
    for prepare, needed in ((images.prepare_test, size), (images.prepare_train, 128)):
        image, box = images.open_reduced(file, needed)
        assert image.size == tuple(-(-side // reduced) for side in whole.size)
        error = abs(levels(prepare(image, size, box=box, **how)) - prepare(whole, size, **how))
        largest, mean = REDUCED_TOLERANCE
        assert error.max() <= largest and error.mean() <= mean, (error.max(), error.mean())


def test_small_jpegs_are_decoded_at_full_scale(tmp_path):
    """A picture of 96 pixels for an embedding of 48 keeps every pixel."""
    photo(96, 96).save(tmp_path / "a.jpg")
    image, box = images.open_reduced(tmp_path / "a.jpg", 48)
    assert image.size == (96, 96) and box is None
