"""An image file of any kind becomes the upright RGB pixels that its maker saw, or says why it cannot."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from metadata import BYTE, FLOAT, ORIENTATION, RATIONAL, RESOLUTION, SHORT, SOFTWARE, TEXT, UNDEFINED, UNIT, with_exif
from PIL import Image

from hf_qie.data.images import BadImage, header_size, read_image, save_image, to_pixels, writes
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.plots import fit


def quarters(width=40, height=20):
    """Red, green, blue and grey quarters: any turn or mirroring shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 200, 0, 0
    pixels[: height // 2, width // 2 :] = 0, 200, 0
    pixels[height // 2 :, : width // 2] = 0, 0, 200
    pixels[height // 2 :, width // 2 :] = 100, 100, 100
    return Image.fromarray(pixels)


@pytest.fixture
def read(tmp_path):
    """`read(image, format, **options)` -> what `read_image` makes of `image` saved in that format."""

    def save_and_read(image, name="image.png", **options):
        image.save(tmp_path / name, **options)
        return read_image(tmp_path / name)

    return save_and_read


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.webp"])
def test_an_image_stands_upright_whatever_its_exif_says(read, orientation, name):
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the camera's turn to the left; EXIF 6 asks for one to the right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright, exif = quarters(), Image.Exif()
    exif[ORIENTATION] = orientation
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    image = read(stored, name, exif=exif, **({"lossless": True} if name.endswith("webp") else {"quality": 95}))
    assert (image.mode, image.size) == ("RGB", upright.size)
    for place in ((10, 5), (30, 5), (10, 15), (30, 15)):  # the middle of each quarter
        np.testing.assert_allclose(image.getpixel(place), upright.getpixel(place), atol=9)  # JPEG


SIDEWAYS = ORIENTATION, SHORT, b"\6\0"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("entries", "turned"),
    [
        ([SIDEWAYS], True),
        ([SIDEWAYS, (RESOLUTION, TEXT, b"72 dpi\0"), (UNIT, SHORT, b"\2\0")], True),
        ([SIDEWAYS, (RESOLUTION, UNDEFINED, b"7"), (UNIT, SHORT, b"\2\0")], True),
        ([SIDEWAYS, (RESOLUTION, RATIONAL, b"\0" * 8)], True),
        ([SIDEWAYS, (SOFTWARE, FLOAT, b"\0\0\x80?")], True),
        ([SIDEWAYS, (0x8769, TEXT, b"nowhere\0"), (0x8825, SHORT, b"\xff\xff")], True),
        ([(ORIENTATION, BYTE, b"\6")], True),
        ([(ORIENTATION, FLOAT, b"\0\0\xc0@")], True),  # 6.0
        ([(ORIENTATION, TEXT, b"6\0")], False),
        ([(ORIENTATION, TEXT, b"Horizontal\0")], False),
        ([(ORIENTATION, RATIONAL, b"\6\0\0\0\0\0\0\0")], False),  # 6 / 0
        ([(ORIENTATION, SHORT, b"")], False),
        ([(ORIENTATION, SHORT, b"\x09\0")], False),
        ([(ORIENTATION, SHORT, b"\0\0")], False),
    ],
)
def test_no_metadata_but_a_whole_orientation_say_anything_of_an_image(tmp_path, format, entries, turned):
    path, upright = tmp_path / "photo", quarters()
    stored = upright.transpose(Image.Transpose.ROTATE_90) if turned else upright
    path.write_bytes(with_exif(stored, format, entries))
    image = read_image(path)
    assert header_size(path) == image.size == upright.size
    for place in ((10, 5), (30, 5), (10, 15), (30, 15)):
        np.testing.assert_allclose(image.getpixel(place), upright.getpixel(place), atol=9)  # JPEG
    assert not image.getexif()


def test_an_image_that_is_open_is_read_as_its_file_is_and_left_as_it_was():
    file = io.BytesIO(with_exif(quarters(), "JPEG", [SIDEWAYS, (SOFTWARE, FLOAT, b"\0\0\x80?")]))
    given = Image.open(file)
    assert read_image(given).tobytes() == read_image(file).tobytes()
    assert given.size == (40, 20) and given.getexif()[ORIENTATION] == 6


def test_what_stands_behind_the_pixels_does_not_turn_them():
    content = with_exif(quarters(), "PNG", [SIDEWAYS])
    length = int.from_bytes(content[33:37], "big") + 12
    file = io.BytesIO(content[:33] + content[33 + length : -12] + content[33 : 33 + length] + content[-12:])
    assert header_size(file) == read_image(file).size == (40, 20)


def test_a_photo_of_a_phone_is_read_or_says_what_to_install(tmp_path):
    path, upright = tmp_path / "photo.heic", quarters()
    path.write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 12)
    with pytest.raises(BadImage, match="HEIF"):  # of a file that is none, whether or not it is installed
        read_image(path)
    pytest.importorskip("pillow_heif")
    upright.resize((160, 80)).save(path, quality=90)
    assert header_size(path) == read_image(path).size == (160, 80)


def on_white(alpha):
    """What RGB (200, 0, 0) of that opacity looks like on white."""
    share = alpha / 255
    return [round(255 - share * (255 - value)) for value in (200, 0, 0)]


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparency_shows_white(read, alpha):
    image = read(Image.new("RGBA", (4, 4), (200, 0, 0, alpha)))
    np.testing.assert_allclose(image.getpixel((0, 0)), on_white(alpha), atol=1)


def test_a_transparent_colour_of_a_palette_shows_white(read):
    paletted = quarters().quantize(4)
    red = paletted.getpixel((0, 0))
    image = read(paletted, transparency=red)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((30, 0)) == (0, 200, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_a_colour_that_is_declared_transparent_shows_white(read, mode):
    image = Image.new(mode, (4, 4), 0)
    image.putpixel((3, 3), (9, 9, 9) if mode == "RGB" else 255)
    image = read(image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


def test_grey_with_transparency_shows_white(read):
    image = Image.new("LA", (2, 1), (50, 255))
    image.putpixel((1, 0), (50, 0))
    image = read(image)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(50, 50, 50), (255, 255, 255)]


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("P", 0, (0, 0, 0)), ("RGB", (1, 2, 3), (1, 2, 3))],
)
def test_plain_modes_keep_their_colours(read, mode, colour, seen):
    image = read(Image.new(mode, (4, 4), colour))
    assert image.mode == "RGB" and image.getpixel((1, 1)) == seen


def test_print_colours_become_light(read):
    image = read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "print.jpg")
    np.testing.assert_allclose(image.getpixel((4, 4)), (255, 0, 0), atol=9)  # JPEG


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_a_grey_tiff_is_turned_whatever_its_depth_and_compression(tmp_path, dtype, compression):
    values, exif, path = np.zeros((9, 5), dtype), Image.Exif(), tmp_path / "scan.tif"
    values[0], exif[ORIENTATION] = 200 if dtype is np.uint8 else 200 * 257, 6
    Image.fromarray(values).save(path, exif=exif, compression=compression)
    for file in (path, io.BytesIO(path.read_bytes())):
        image = read_image(file)
        assert image.size == (9, 5) == header_size(path)
        assert (np.asarray(image)[:, -1] == 200).all() and not np.asarray(image)[:, :-1].any()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_grey_of_16_bits_keeps_its_range(read, name):
    values = np.array([[0, 255, 257, 32768, 65535]] * 2, np.uint16)
    image = read(Image.fromarray(values), name)
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0))[0] for x in range(5)] == [0, 1, 1, 128, 255]


def test_a_dark_image_of_16_bits_stays_dark(read):
    assert read(Image.fromarray(np.full((4, 4), 200, np.uint16))).getpixel((0, 0)) == (1, 1, 1)


def test_floats_are_bad_since_nothing_says_their_range(read):
    with pytest.raises(BadImage, match="floats without a range"):
        read(Image.new("F", (4, 4), 0.5), "depth.tif")


@pytest.mark.parametrize(("name", "options"), [("moving.gif", {}), ("moving.webp", {"lossless": True})])
def test_of_a_moving_image_the_first_frame_counts(read, name, options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = read(frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert image.getpixel((4, 4)) == (255, 0, 0)


def test_the_content_and_not_the_name_says_the_format(read):
    assert read(quarters(), "webp_in_truth.jpg", format="WEBP", lossless=True).size == (40, 20)


def encoded(format, **options):
    buffer = io.BytesIO()
    quarters().save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "UnidentifiedImageError: it is empty"),
        (b"<!DOCTYPE html><html>404 Not Found", "UnidentifiedImageError: it begins with '<!DOCTYPE html><html>404"),
        (encoded("JPEG")[:300], "OSError: "),
        (encoded("PNG")[:-40], "truncated"),
        (encoded("WEBP")[:60], "Error: "),
        (encoded("AVIF")[:-20], "Error: "),
    ],
)
def test_a_broken_file_is_bad_with_a_reason(tmp_path, content, reason):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    for file in (path, io.BytesIO(content)):
        with pytest.raises(BadImage, match=rf"^cannot read the image \(.*{reason}.*\)$"):
            read_image(file)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on what it can still read
def test_damage_of_any_kind_is_bad_or_read(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    rng, path = random.Random(0), tmp_path / "damaged"
    whole = [encoded(format, exif=exif) for format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")]
    whole += [encoded(format) for format in ("GIF", "BMP", "JPEG2000", "ICO", "TGA")]
    bad = 0
    for _ in range(600):
        content = bytearray(rng.choice(whole))
        del content[rng.choice([len(content), rng.randrange(len(content))]) :]
        for _ in range(rng.choice([0, 1, 5]) if content else 0):
            content[rng.randrange(min(len(content), 300))] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(content)
        try:
            assert read_image(path).mode == "RGB"
        except BadImage:
            bad += 1
    assert 100 < bad < 600


def test_what_is_no_fault_of_the_metadata_makes_no_image_upright(read, monkeypatch):
    def fail(_):
        raise MemoryError("of the machine")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    with pytest.raises(BadImage, match="MemoryError: of the machine"):
        read(quarters(), "a.jpg")


def test_a_folder_and_a_missing_file_are_bad(tmp_path):
    with pytest.raises(BadImage, match="IsADirectoryError"):
        read_image(tmp_path)
    with pytest.raises(BadImage, match="FileNotFoundError"):
        read_image(tmp_path / "gone.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_bad_before_it_is_decoded(read, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(BadImage, match=r"^40 x 20 pixels are more than 500$"):
        read(quarters())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # from twice on, Pillow itself refuses
    with pytest.raises(BadImage, match="DecompressionBombError"):
        read(quarters())


@pytest.mark.parametrize("size", [(81, 10), (10, 81)])
def test_a_strip_longer_than_8_to_1_is_bad(read, size):
    with pytest.raises(BadImage, match=f"^{size[0]} x {size[1]} pixels are longer than 8 to 1$"):
        read(Image.new("RGB", size))
    assert read(Image.new("RGB", (80, 10))).size == (80, 10)


def test_area_size_is_the_pipelines_calculate_dimensions():
    rng = np.random.default_rng(0)
    sizes = [(int(w), int(h)) for w, h in rng.integers(64, 4096, (2000, 2)) if max(w, h) <= 8 * min(w, h)]
    sizes += [(n, m) for n in range(1, 30) for m in range(1, 30)]  # simple ratios, which fall on halves
    for area_px in (384 * 384, 512 * 512, 1024 * 1024, 80 * 80):
        for width, height in sizes:
            assert EDIT_PLUS.fit((width, height), area_px) == calculate_dimensions(area_px, width / height)[:2]


def test_halves_are_rounded_to_even_as_the_pipelines_do():
    assert EDIT_PLUS.fit((1, 1), 80 * 80) == (64, 64)  # 2.5 x 32
    assert EDIT_PLUS.fit((1, 1), 112 * 112) == (128, 128)  # 3.5 x 32


def test_pixels_go_from_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 51, 255]]], np.uint8))
    torch.testing.assert_close(to_pixels(image)[:, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))


# --- with alpha


def read_rgba(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return read_image(tmp_path / name, "RGBA")


@pytest.mark.parametrize("name", ["image.png", "image.webp", "image.tif"])
def test_alpha_is_kept_to_the_bit(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 4), np.uint8)
    image = read_rgba(
        tmp_path, Image.fromarray(pixels), name, **({"lossless": True, "exact": True} if "w" in name else {})
    )
    assert image.mode == "RGBA" and not image.info
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "I;16", "RGBX"])
def test_an_image_without_alpha_is_opaque_and_else_as_in_rgb(tmp_path, mode):
    values = np.random.default_rng(0).integers(0, 65536, (9, 5), np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else quarters().convert(mode)
    name = "image.tif" if mode in ("CMYK", "RGBX") else "image.png"
    seen = read_rgba(tmp_path, image, name)
    assert (np.asarray(seen)[..., 3] == 255).all()
    np.testing.assert_array_equal(np.asarray(seen)[..., :3], np.asarray(read_image(tmp_path / name)))


def test_a_palette_and_grey_keep_what_is_transparent(tmp_path):
    paletted = quarters().quantize(4)
    image = read_rgba(tmp_path, paletted, transparency=paletted.getpixel((0, 0)))
    assert (image.getpixel((0, 0))[3], image.getpixel((30, 0))) == (0, (0, 200, 0, 255))
    grey = Image.new("LA", (2, 1), (50, 255))
    grey.putpixel((1, 0), (60, 7))
    image = read_rgba(tmp_path, grey)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(50, 50, 50, 255), (60, 60, 60, 7)]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_image_with_alpha_stands_upright(tmp_path, orientation):
    image, exif = quarters(), Image.Exif()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif[ORIENTATION] = orientation
    seen = read_rgba(tmp_path, image, exif=exif)
    assert seen.size == header_size(tmp_path / "image.png")
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    assert seen.tobytes() == (image.transpose(turns[orientation]) if orientation in turns else image).tobytes()


def test_pixels_have_as_many_channels_as_the_image():
    image = Image.fromarray(np.array([[[0, 51, 255, 102]]], np.uint8))
    torch.testing.assert_close(to_pixels(image)[:, 0, 0], torch.tensor([-1.0, -0.6, 1.0, -0.2]))


def test_on_a_sheet_what_is_transparent_is_white():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    seen = fit(image, 8)
    assert (seen.mode, seen.getpixel((0, 0)), seen.getpixel((7, 7))) == ("RGB", (200, 0, 0), (255, 255, 255))


@pytest.mark.parametrize(
    ("name", "keeps_alpha"),
    [("a.png", True), ("a.webp", True), ("a.TIFF", True), ("a.jpg", False), ("a.bmp", False), ("a.ppm", False)],
)
def test_what_is_transparent_stands_on_white_where_a_format_has_no_alpha(tmp_path, name, keeps_alpha):
    image = Image.new("RGBA", (16, 8), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 8, 8))
    save_image(image, tmp_path / name)
    assert writes(Image.registered_extensions()[Path(name).suffix.lower()], "RGBA") == keeps_alpha
    with Image.open(tmp_path / name) as back:
        assert back.has_transparency_data == keeps_alpha
        pixels = np.asarray(back.convert("RGBA")).astype(int)
    wanted = [(0, 0, 200, 255), (200, 0, 0, 0) if keeps_alpha else (255, 255, 255, 255)]
    for column, colour in zip((2, 13), wanted, strict=True):
        seen = pixels[4, column] if colour[3] else pixels[4, column, 3:]
        assert np.abs(seen - (colour if colour[3] else colour[3:])).max() < 12  # JPEG's loss


def test_an_image_without_alpha_is_saved_as_it_is(tmp_path):
    image = Image.effect_noise((16, 8), 64).convert("RGB")
    save_image(image, tmp_path / "a.bmp")
    assert Image.open(tmp_path / "a.bmp").tobytes() == image.tobytes()
    assert not writes("XBM", "RGB") and not writes("PSD", "RGB")
