"""Image files as a viewer shows them, and the paper's transforms.

    open_image(path)                   -> RGB PIL image, the one way in which files are opened
    open_reduced(path, short_side)     -> the same with JPEGs at a reduced scale, and its box
    as_shown(image, name)              -> the same of a PIL image that is open
    prepare_train(image, size)         -> (R, R, 3) uint8, R = train_side(size)
    prepare_test(image, size)          -> (size, size, 3) uint8
    resizing(preprocessing)            how a checkpoint's images are resized, as arguments of these
    normalise(images, mean, std)       uint8 (B, 3, H, W) -> float32, for the backbone

SUFFIXES holds the suffixes of the formats that are opened. Set the environment variable
UDON_MAX_PIXELS to open larger images than Pillow allows.
Copy with: torch, numpy, pillow.
"""

import errno
import logging
import os
import stat
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, features

# Raster formats with a decoder inside Pillow: {format: suffixes}. No other decoder is tried,
# whatever a file is named: some start external programs.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
}
OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # parts of Pillow
FORMATS = {f: s for f, s in FORMATS.items() if f not in OPTIONAL or features.check(OPTIONAL[f])}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)

# A JPEG decoded at 1/2, 1/4 or 1/8 keeps at least this multiple of the resolution needed; bicubic
# interpolation then changes pixels by a fifth more than bilinear does.
REDUCED_MARGIN = 9 / 8
# An image that is longer, in multiples of its short side, is cropped before it is resized.
LONGEST = 16
BILINEAR = Image.Resampling.BILINEAR


def _silence_pillow():
    """Its warnings and log messages name no file; those that matter are InputErrors here."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


_silence_pillow()
logging.getLogger("PIL").addHandler(logging.NullHandler())


class InputError(ValueError):
    """Data that cannot be used: what, its value, what is allowed and the remedy, in a sentence."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text with control characters and undecodable bytes of file names escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# Opening ------------------------------------------------------------------------------------------


def open_image(path: str | os.PathLike) -> Image.Image:
    """Opens an image file as a viewer shows it: RGB, upright, transparency on white.

    Applies the EXIF orientation. Of an animation it takes the first frame. Integer pixels of more
    than 8 bits are scaled by their range, 0..65535 or 0..2^31 - 1; float pixels must be in 0..1.
    Raises InputError, which names the file, for a file that is missing, no regular file, of
    another format, damaged, or larger than Pillow allows.
    """
    return open_reduced(path)[0]


def open_reduced(
    path: str | os.PathLike, short_side: int | None = None
) -> tuple[Image.Image, tuple[float, float, float, float] | None]:
    """Opens an image of which `short_side` pixels of the shorter side are needed -> image, box.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the shorter side keeps 9/8 of that.
    `box` is the part (left, upper, right, lower) of the image that the picture then covers, not
    always in whole pixels; None for an image at full scale. Raises as open_image does.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would block
            raise InputError(
                f"image {path} is not a regular file: replace it or take it out of the data"
            )
        _set_pixel_limit()
        with warnings.catch_warnings():  # the caller may have reset the filters
            _silence_pillow()
            return _decoded(path, short_side)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(
            f"image {path} has more than Pillow's limit of {2 * Image.MAX_IMAGE_PIXELS:,} pixels: "
            "shrink it, or allow N pixels with the environment variable UDON_MAX_PIXELS=N"
        ) from None
    except Exception as error:  # broken files raise OSError, SyntaxError, struct.error, ...
        raise InputError(
            f"image {path} cannot be read ({_reason(error)}): repair it or take it out of the data"
        ) from None


def _decoded(path, short_side):
    with Image.open(path, formats=tuple(FORMATS)) as image:
        if image.format == "PNG":
            with Image.open(path, formats=("PNG",)) as checked:
                checked.verify()  # the checksums of the pixels, which load() does not read
        box = None
        if short_side is not None:
            least = int(np.ceil(REDUCED_MARGIN * short_side))
            drafted = image.draft(None, (least, least))  # None for formats other than JPEG
            box = drafted[1] if drafted is not None and image.decoderconfig[0] > 1 else None
        image.load()
        return _upright(_rgb(image, path), _orientation(image), box)


def as_shown(image: Image.Image, name: str = "of the caller") -> Image.Image:
    """A PIL image as `open_image` returns it: RGB, upright, transparency on white. Raises
    InputError, with the image's name, for pixels that cannot be scaled."""
    return _upright(_rgb(image, name), _orientation(image), None)[0]


def _set_pixel_limit():
    """Raises Pillow's limit to that of the environment; Pillow refuses twice its limit."""
    limit = os.environ.get("UDON_MAX_PIXELS")
    if limit is not None:
        if not limit.isdecimal() or not 0 < len(limit) < 16:
            raise InputError(f"UDON_MAX_PIXELS is {limit!r}: give a positive number of pixels")
        Image.MAX_IMAGE_PIXELS = max(1, -(-int(limit) // 2))


def _reason(error):
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.errno == errno.ENOENT:
        return "it does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def _rgb(image, path):
    """An RGB image of any other mode."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":  # I, I;16, I;16B, F
        return Image.fromarray(_grey(image, path)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        opaque = Image.new("RGB", image.size, "white")
        image = image.convert("RGBA")
        opaque.paste(image, mask=image)
        return opaque
    return image.convert("RGB")


def _grey(image, path):
    """(H, W) uint8 of an image of integers or floats, by their range."""
    values = np.asarray(image)
    low, high = values.min().item(), values.max().item()
    if image.mode == "F":
        top = 1.0
    else:  # a 16-bit image may come in 32 bits
        top = 65535 if image.mode != "I" or high <= 65535 else 2**31 - 1
    if not 0 <= low <= high <= top:  # false for NaN, too
        raise InputError(
            f"image {path} has pixels from {low} to {high} where 0 to {top} is allowed: rescale it"
        )
    grey = np.multiply(values, np.float32(255 / top), dtype=np.float32)  # large: little memory
    grey = np.rint(grey, out=grey).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey


TRANSPOSITIONS = {  # of the EXIF orientations: how an upright image comes from the stored one
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image):
    """The EXIF orientation, 1 to 8. Damaged EXIF data count as none, as in viewers."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:
        return 1
    return orientation if orientation in TRANSPOSITIONS else 1


def _upright(image, orientation, box):
    """image and box, transposed as the EXIF orientation says."""
    if orientation == 1:
        return image, box
    image = image.transpose(TRANSPOSITIONS[orientation])
    if box is not None:  # it starts at the upper left corner of the stored image
        width, height = box[2:] if orientation < 5 else (box[3], box[2])
        left = image.width - width if orientation in (2, 3, 6, 7) else 0
        upper = image.height - height if orientation in (3, 4, 7, 8) else 0
        box = (left, upper, left + width, upper + height)
    return image, box


# Transforms (paper section 4; official setting) ---------------------------------------------------


def resize(
    image: Image.Image,
    width: int,
    height: int,
    antialias: bool = True,
    box: tuple[float, float, float, float] | None = None,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """An RGB image, or the part of it in `box` -> (height, width, 3) uint8.

    interpolation: "bilinear", "bicubic" or "lanczos". antialias=False is the official code's
    TensorFlow resize, which is bilinear always.
    """
    if antialias:
        method = Image.Resampling[interpolation.upper()]
        return np.asarray(image.resize((width, height), method, box=box))
    if box is not None:
        extent = Image.Transform.EXTENT
        return np.asarray(image.transform((width, height), extent, box, BILINEAR))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(
        pixels, (height, width), mode="bilinear", antialias=False, align_corners=False
    )
    return pixels[0].permute(1, 2, 0).round().byte().numpy()


def resizing(preprocessing: dict) -> dict:
    """{"antialias", "interpolation"} of a checkpoint's preprocessing; an older one is bilinear."""
    interpolation = preprocessing.get("interpolation", "bilinear")
    return {"antialias": preprocessing["antialias"], "interpolation": interpolation}


def train_side(size: int) -> int:
    """Training images are resized to this side and cropped to `size`: 256 for 224."""
    return round(size * 256 / 224)


def prepare_train(
    image: Image.Image, size: int, antialias: bool = True, box=None, interpolation="bilinear"
) -> np.ndarray:
    """(R, R, 3) uint8 with R = train_side(size): the whole image, its aspect ratio ignored. Random
    crop and flip come later. box: the part that the picture covers, see open_reduced."""
    return resize(image, train_side(size), train_side(size), antialias, box, interpolation)


def prepare_test(
    image: Image.Image, size: int, antialias: bool = True, box=None, interpolation="bilinear"
) -> np.ndarray:
    """(size, size, 3) uint8: the short side resized to `size`, then the centre. Memory follows
    `size`, whatever the aspect ratio. box: the part that the picture covers, see open_reduced.

    Pillow rounds the corners of a box to single precision, which changes some pixels by one level:
    images at full scale are resized as a whole before they are cropped, unless they are thin."""
    left, upper, right, lower = box or (0, 0, *image.size)
    sides = right - left, lower - upper
    width, height = (max(size, int(side * size / min(sides))) for side in sides)
    x, y = (width - size) // 2, (height - size) // 2  # of the crop in the resized image
    if box is None and max(width, height) <= LONGEST * size:
        whole = resize(image, width, height, antialias, interpolation=interpolation)
        return whole[y : y + size, x : x + size]
    step_x, step_y = sides[0] / width, sides[1] / height
    crop = (left + x * step_x, upper + y * step_y)
    crop += (min(right, crop[0] + size * step_x), min(lower, crop[1] + size * step_y))
    return resize(image, size, size, antialias, crop, interpolation)


def normalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (B, 3, H, W) in 0..255 -> float32 (x / 255 - mean) / std, on the images' device."""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std)
