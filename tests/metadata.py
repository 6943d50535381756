"""Images with EXIF that no library would write: any value of any type under any tag."""

import struct
import zlib
from collections.abc import Iterable
from io import BytesIO

from PIL import Image

ORIENTATION, RESOLUTION, UNIT, SOFTWARE = 0x0112, 0x011A, 0x0128, 0x0131
BYTE, TEXT, SHORT, LONG, RATIONAL, UNDEFINED, FLOAT = 1, 2, 3, 4, 5, 7, 11  # types of EXIF
SIZES = {
    BYTE: 1,
    TEXT: 1,
    SHORT: 2,
    LONG: 4,
    RATIONAL: 8,
    6: 1,
    UNDEFINED: 1,
    8: 2,
    9: 4,
    10: 8,
    FLOAT: 4,
    12: 8,
    13: 4,
}

Entry = tuple[int, int, bytes]  # tag, type, value


def exif_block(entries: Iterable[Entry]) -> bytes:
    """One directory of entries, as it stands in EXIF and in TIFF."""
    entries, head, values = sorted(entries), b"", b""
    for tag, kind, value in entries:
        place = 8 + 2 + 12 * len(entries) + 4 + len(values)
        head += struct.pack("<HHL", tag, kind, len(value) // SIZES[kind])
        head += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<L", place)
        values += value if len(value) > 4 else b""
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + head + struct.pack("<L", 0) + values


def with_exif(image: Image.Image, name: str, entries: Iterable[Entry]) -> bytes:
    """`image` in the format `name`, with these entries."""
    file, entries = BytesIO(), list(entries)
    if name == "TIFF":
        return tiff(image, entries)
    if name == "WEBP":
        image.save(file, name, lossless=True, exif=exif_block(entries))
        return file.getvalue()
    image.save(file, name, quality=95)
    content, block = file.getvalue(), exif_block(entries)
    if name == "PNG":
        chunk = b"eXIf" + block
        chunk = struct.pack(">L", len(block)) + chunk + struct.pack(">L", zlib.crc32(chunk))
        return content[:33] + chunk + content[33:]
    assert name == "JPEG"
    block = b"Exif\0\0" + block
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[20:]  # in place of JFIF


def tiff(image: Image.Image, entries: Iterable[Entry]) -> bytes:
    """An RGB image as a TIFF of one strip."""
    pixels, place = image.tobytes(), b"\0" * 4
    for _ in range(2):  # the second time it is known where the pixels begin
        own = {0x0111: (LONG, place), 0x0117: (LONG, struct.pack("<L", len(pixels)))}
        own |= {0x0102: (SHORT, struct.pack("<HHH", 8, 8, 8))}
        named = {0x0100: image.width, 0x0101: image.height, 0x0103: 1, 0x0106: 2, 0x0115: 3, 0x0116: image.height}
        own |= {tag: (SHORT, struct.pack("<H", value)) for tag, value in named.items()}
        block = exif_block([(tag, *own[tag]) for tag in own] + [entry for entry in entries if entry[0] not in own])
        place = struct.pack("<L", len(block))
    return block + pixels
