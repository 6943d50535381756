"""From an image file to the pixels that encoder and VAE see. Sizes are (width, height) in pixels, as in PIL."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

MAX_ASPECT = 8  # beyond it the 32-pixel rounding of `area_size` distorts, and no checkpoint has seen it
SIDE_MULTIPLE_PX = 32
BEGINNING_BYTES = 32  # told of a file that is no picture
HEIF = b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf"  # how a file begins behind 4 bytes
# by orientation, as ImageOps.exif_transpose does, which fails where other metadata are damaged: it writes them again
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
with suppress(ImportError):  # an extra; without it such an image is bad, with the command that installs it
    from pillow_heif import register_heif_opener

    register_heif_opener()
Image.init()  # all formats: Pillow loads them when it first meets one, and of two threads that meet it one may miss it


class BadImage(ValueError):
    """A picture that cannot be used; the message says why, not where."""


class Jpeg(JpegImageFile):
    """A JPEG of which EXIF is not read while it opens, as a resolution of the wrong type lets Pillow give it up."""

    def _read_dpi_from_exif(self) -> None:
        pass


@contextmanager
def opened(file: Path | BytesIO | Image.Image) -> Iterator[Image.Image]:
    """A picture whose header is fit; what goes wrong with its pixels inside is told the same way.

    Only Pillow's own work belongs inside: whatever it raises there is the fault of this one file.

    Raises:
        BadImage: the file is missing, unreadable, too large (`Image.MAX_IMAGE_PIXELS`) or longer than 8 to 1, or its
            pixels are floats, which have no known range.
    """
    try:
        with open_image(file) as image:
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
    except Exception as error:  # hostile bytes make Pillow's decoders raise anything, and it is this file's alone
        raise BadImage(f"cannot read the picture ({type(error).__name__}: {error})") from error


def open_image(file: Path | BytesIO | Image.Image) -> Image.Image:
    """An image with its header read, or a copy of one that is open; raises what Pillow does."""
    if isinstance(file, Image.Image):
        return file.copy()
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if not head_of(file).startswith(b"\xff\xd8\xff"):
            raise
        return Jpeg(file if isinstance(file, Path) else BytesIO(file.getvalue()))


def read_image(file: Path | BytesIO | Image.Image) -> Image.Image:
    """Read a picture upright and in RGB: EXIF turned, alpha on white, first frame, 16-bit grey scaled to 8.

    The pipelines convert nothing, so it has to be right before they see it. Raises BadImage.
    """
    with opened(file) as image:
        image = to_rgb(upright(image))
        image.info.clear()  # an orientation among them would turn it again
        return image


def header_size(file: Path | BytesIO) -> tuple[int, int]:
    """The size that `read_image` will give, by the header alone; raises BadImage as far as the header tells."""
    with opened(file) as image:
        # TIFF's own `size` may be turned already
        size = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
        return size[::-1] if orientation(image) >= 5 else size


def upright(image: Image.Image) -> Image.Image:
    """`image` decoded and turned by its orientation; no other metadata are read, and none is written."""
    turn = TURNS.get(orientation(image))
    if image.format == "TIFF":  # its own hook turns it, and decodes all metadata for that
        image.load_end = lambda: None
    image.load()
    return image.transpose(turn) if turn is not None else image


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where none of these stands before the pixels, as `header_size` sees no more."""
    try:
        # the base class's: PNG's own decodes the picture, to look for EXIF behind it
        tags = image.tag_v2 if image.format == "TIFF" else Image.Image.getexif(image)
        value = tags.get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's, on damaged metadata, which say nothing of the pixels
        return 1
    value = value[0] if isinstance(value, bytes | tuple) and value else value
    return int(value) if value in range(1, 9) else 1


def head_of(file: Path | BytesIO) -> bytes:
    """The first bytes of a file."""
    with file.open("rb") if isinstance(file, Path) else BytesIO(file.getvalue()) as content:
        return content.read(BEGINNING_BYTES)


def beginning(file: Path | BytesIO) -> str:
    """How a file begins that Pillow does not know: web pages, JSON and Git LFS pointers show at once."""
    head = head_of(file)
    if head[4:].startswith(HEIF):
        return "it is HEIF, as phones save it; pip install pillow-heif"
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
