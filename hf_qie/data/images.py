"""From an image file to the pixels that encoder and VAE see. Sizes are (width, height) in pixels, as in PIL."""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

MAX_ASPECT = 8  # beyond it the 32-pixel rounding of sizes distorts, and no checkpoint has seen it
HEIF = b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf"  # how a file begins after 4 bytes
# by EXIF orientation, as in ImageOps.exif_transpose, which also writes the other metadata again and fails on damaged
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# what Pillow raises where the bytes of metadata make no sense; anything else makes the image a bad one
DAMAGED_METADATA = SyntaxError, struct.error, ValueError, TypeError, LookupError
with suppress(ImportError):  # an extra; without it a HEIF image is bad, and the reason names the package
    from pillow_heif import register_heif_opener

    register_heif_opener()
Image.init()  # loads all formats now: with threads, Pillow's own loading on demand may miss one


class BadImage(ValueError):
    """An image that cannot be used; the message says why, not where."""


class _Jpeg(JpegImageFile):
    """A JPEG whose EXIF is not read while it opens: for a resolution of the wrong type Pillow does not identify it."""

    def _read_dpi_from_exif(self) -> None:
        pass


def _open(file: Path | BytesIO) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        with suppress(SyntaxError):
            return _Jpeg(file if isinstance(file, Path) else BytesIO(file.getvalue()))
        raise


@contextmanager
def _opened(file: Path | BytesIO | Image.Image) -> Iterator[Image.Image]:
    """An image whose header is valid. Only Pillow's work belongs inside: what it raises is the fault of this file."""
    try:
        with file.copy() if isinstance(file, Image.Image) else _open(file) as image:
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
        raise BadImage(f"cannot read the image (UnidentifiedImageError: {_beginning(file)})") from error
    except Exception as error:  # damaged bytes make Pillow's decoders raise anything
        raise BadImage(f"cannot read the image ({type(error).__name__}: {error})") from error


def _beginning(file: Path | BytesIO) -> str:
    """The first bytes of a file that is not an image: web pages, JSON and Git LFS pointers are recognised by them."""
    with file.open("rb") if isinstance(file, Path) else BytesIO(file.getvalue()) as content:
        head = content.read(32)
    if head[4:].startswith(HEIF):
        return "it is HEIF, as phones save it; pip install pillow-heif"
    return f"it begins with {repr(head)[1:]}" if head else "it is empty"


def read_image(file: Path | BytesIO | Image.Image, mode: str = "RGB") -> Image.Image:
    """Read an image upright and in `mode`: EXIF turned, first frame, 16-bit grey scaled to 8.

    In RGB what is transparent stands on white; in RGBA alpha is kept, and 255 where an image has none. The pipelines
    convert nothing, so this comes before them.

    Raises:
        BadImage: the file is missing, cannot be read, is too large (`Image.MAX_IMAGE_PIXELS`) or longer than 8 to 1,
            or its pixels are floats, which have no known range.
    """
    with _opened(file) as image:
        turn = TURNS.get(_orientation(image))
        if image.format == "TIFF":  # its own hook turns it too, and decodes all metadata for that
            image.load_end = lambda: None
            image.filename = ""  # Pillow would map a file without compression in the size of the turned image
        image.load()
        image = _converted(image if turn is None else image.transpose(turn), mode)
        image.info.clear()  # an orientation among them would turn it again
        return image


def header_size(file: Path | BytesIO) -> tuple[int, int]:
    """The size that `read_image` will give, from the header alone; raises BadImage as far as the header tells."""
    with _opened(file) as image:
        # TIFF's own `size` may be turned already
        size = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
        return size[::-1] if _orientation(image) >= 5 else size


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where none of these comes before the pixels, as `header_size` sees no more."""
    try:
        # the base class's: PNG's own decodes the image to look for EXIF behind it
        tags = image.tag_v2 if image.format == "TIFF" else Image.Image.getexif(image)
        value = tags.get(ExifTags.Base.Orientation)
    except DAMAGED_METADATA:  # which say nothing of the pixels
        return 1
    value = value[0] if isinstance(value, bytes | tuple) and value else value
    return int(value) if value in range(1, 9) else 1


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips at 255
        values = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return image if mode == "RGBA" else on_white(image)
    return image.convert("RGB").convert(mode)


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA image in RGB, what is transparent on white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def writes(format: str, mode: str) -> bool:
    """Whether Pillow writes images of `mode`, RGB or RGBA, in a format, alpha included: some drop it in silence."""
    file = BytesIO()
    try:
        Image.new(mode, (16, 16)).save(file, format)
        return mode == "RGB" or Image.open(file).has_transparency_data
    except (OSError, ValueError, KeyError):  # what Pillow's writers raise for a mode that they lack, or without one
        return False


def save_image(image: Image.Image, path: Path) -> None:
    """Save an image in the format of the name; what is transparent stands on white where that has no alpha."""
    format = Image.registered_extensions()[path.suffix.lower()]
    (image if image.mode != "RGBA" or writes(format, "RGBA") else on_white(image)).save(path, format)


def to_pixels(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """`[..., channels, H, W]` float32 in [-1, 1] of an image, or of `[..., H, W, channels]` uint8.

    As the pipelines' `VaeImageProcessor.preprocess`.
    """
    values = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))
    return 2.0 * (values.float() / 255.0).movedim(-1, -3) - 1.0
