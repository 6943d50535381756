"""From a picture file to the pixels that encoder and VAE see. Sizes are (width, height) in pixels, as in PIL."""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.Image import DecompressionBombError

MAX_ASPECT = 8  # beyond it the 32-pixel rounding of `area_size` distorts, and no checkpoint has seen it
SIDE_MULTIPLE_PX = 32
BEGINNING_BYTES = 32  # told of a file that is no picture
# what Pillow's readers raise on damaged files
BROKEN = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, MemoryError, struct.error, DecompressionBombError)
Image.init()  # all formats: Pillow loads them when it first meets one, and of two threads that meet it one may miss it


class BadImage(ValueError):
    """A picture that cannot be used; the message says why, not where."""


@contextmanager
def opened(file: Path | BytesIO) -> Iterator[Image.Image]:
    """A picture whose header is fit; what goes wrong with its pixels inside is told the same way.

    Raises:
        BadImage: the file is missing, unreadable, too large (`Image.MAX_IMAGE_PIXELS`) or longer than 8 to 1, or its
            pixels are floats, which have no known range.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise BadImage(f"{width} x {height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise BadImage(f"{width} x {height} pixels are longer than {MAX_ASPECT} to 1")
            if image.mode == "F":
                raise BadImage("its pixels are floats without a range; save it with 8 or 16 bits")
            yield image
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # its own message names a place in memory
        raise BadImage(f"cannot read the picture (UnidentifiedImageError: {beginning(file)})") from error
    except BROKEN as error:
        raise BadImage(f"cannot read the picture ({type(error).__name__}: {error})") from error


def read_image(file: Path | BytesIO) -> Image.Image:
    """Read a picture upright and in RGB: EXIF turned, alpha on white, first frame, 16-bit grey scaled to 8.

    The pipelines convert nothing, so it has to be right before they see it. Raises BadImage.
    """
    with opened(file) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def header_size(file: Path | BytesIO) -> tuple[int, int]:
    """The size that `read_image` will give, by the header alone; raises BadImage as far as the header tells."""
    with opened(file) as image:
        # the base class's: PNG's own decodes the picture, to look for EXIF behind it
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) >= 5
        return image.size[::-1] if turned and image.format != "TIFF" else image.size  # TIFF opens turned


def beginning(file: Path | BytesIO) -> str:
    """How a file begins that is no picture: web pages, JSON and Git LFS pointers show at once."""
    with file.open("rb") if isinstance(file, Path) else BytesIO(file.getvalue()) as content:
        head = content.read(BEGINNING_BYTES)
    return f"it begins with {repr(head)[1:]}" if head else "it is empty"


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` of any mode but floats as RGB, transparency on white."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips at 255
        values = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def area_size(size: tuple[int, int], area_px: int) -> tuple[int, int]:
    """The size with the aspect of `size`, about `area_px` in area and sides that are multiples of 32.

    The pipelines' `calculate_dimensions` (diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:158).
    """
    ratio = size[0] / size[1]
    width = math.sqrt(area_px * ratio)
    height = width / ratio
    return round(width / SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX, round(height / SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """As the pipelines' `VaeImageProcessor.resize`: LANCZOS, no crop."""
    return image.resize(size, Image.Resampling.LANCZOS)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """`[3, H, W]` float32 in [-1, 1], as the pipelines' `VaeImageProcessor.preprocess`."""
    values = np.asarray(image, dtype=np.float32) / 255.0
    return 2.0 * torch.from_numpy(values).permute(2, 0, 1) - 1.0
