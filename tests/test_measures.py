"""Scores of images: constructed images give known answers."""

import math
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from skimage import data

from hf_qie.measures.edits import SCORES, aggregate, are_aligned, compare, make_pair, score_edit
from hf_qie.measures.registration import register

PHOTOS = ("astronaut", "coffee", "rocket")  # as scikit-image ships them
BORDER_PX = 16  # cut from photos that are moved, so that no edge shows


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return [getattr(data, name)() for name in PHOTOS]


@pytest.fixture(scope="module")
def edit(photos) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A source, a target that shows another photo on an ellipse of 30 % of it, and where, bool [H, W]."""
    source, other = photos[1], np.asarray(Image.fromarray(photos[2]).resize((600, 400)))
    y, x = np.mgrid[:400, :600]
    where = ((x / 600 - 0.45) ** 2 + (y / 400 - 0.5) ** 2) < 0.3 / math.pi
    return source, np.where(where[..., None], other, source), where


def moved(image: np.ndarray, dx: float, dy: float, scale: float = 1.0) -> np.ndarray:
    """The image, without its border, with what was at p from the centre at scale * p + (dx, dy)."""
    height, width = image.shape[:2]
    x, y = width / 2, height / 2
    matrix = (1 / scale, 0, x - (x + dx) / scale, 0, 1 / scale, y - (y + dy) / scale)
    image = Image.fromarray(image).transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(image)[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX]


def worse(image: np.ndarray, seed: int) -> np.ndarray:
    """As a VAE and a JPEG of quality 75 leave an image, and lighter."""
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))
    noisy = blurred + np.random.default_rng(seed).normal(0, 2, image.shape)
    lighter = ImageEnhance.Brightness(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))).enhance(1.1)
    file = BytesIO()
    lighter.save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize(
    ("dx", "dy", "scale"), [(0, 0, 1), (3, 0, 1), (0.3, -2.6, 1), (-8.5, 8.5, 1), (0, 0, 1.02), (4.2, -7.7, 0.96)]
)
def test_the_motion_of_an_image_is_found_in_spite_of_an_edit_noise_and_another_tone(photos, dx, dy, scale):
    for number, photo in enumerate(photos):
        fixed, moving = moved(photo, 0, 0), moved(photo, dx, dy, scale).copy()
        height, width = fixed.shape[0] // 2, fixed.shape[1] * 3 // 5  # 30 % of the area
        moving[30 : 30 + height, 40 : 40 + width] = photos[number - 1][:height, :width]
        found = register(worse(moving, number), fixed)
        assert (found.dx_px, found.dy_px) == pytest.approx((dx, dy), abs=0.25)
        half_px = max(found.size_px) / 2
        assert np.multiply((found.scale_x - scale, found.scale_y - scale), half_px) == pytest.approx(0, abs=0.5)
        assert found.zoom_px == pytest.approx(abs(scale - 1) * half_px, abs=0.5)


def test_a_stretch_is_a_scale_of_one_axis(photos):
    height, width = photos[0].shape[:2]
    wide = np.asarray(Image.fromarray(photos[0]).resize((round(width * 1.03), height), Image.Resampling.BICUBIC))
    left = (wide.shape[1] - width) // 2
    found = register(wide[:, left : left + width], photos[0])
    assert (found.scale_x, found.scale_y) == pytest.approx((wide.shape[1] / width, 1), abs=0.0005)


def test_only_what_the_mask_shows_is_registered(photos):
    still, shifted = photos[0], np.roll(photos[0], 5, axis=1)
    mask = np.zeros(still.shape[:2], bool)
    mask[:, : mask.shape[1] * 2 // 3] = True
    moving = np.where(mask[..., None], still, shifted)  # most of the image stands still
    assert register(moving, still).dx_px == pytest.approx(0, abs=0.05)
    assert register(moving, still, ~mask).dx_px == pytest.approx(5, abs=0.05)


def test_no_motion_is_told_where_none_can_be_known(photos):
    flat = np.full((300, 300, 3), 128, np.uint8)
    ramp = np.broadcast_to(np.arange(300, dtype=np.float32)[:, None] * 0.8, (300, 300))  # no shift along its lines
    ramp = np.repeat(ramp.astype(np.uint8)[..., None], 3, axis=2)
    resized = [np.asarray(Image.fromarray(photo).resize((512, 400))) for photo in photos]
    for moving, fixed in [(flat, flat), (ramp, ramp), *zip(resized, resized[1:] + resized[:1], strict=True)]:
        found = register(moving, fixed)
        assert not found.is_known
        assert all(map(math.isnan, (found.dx_px, found.dy_px, found.scale_x, found.drift_px, found.zoom_px)))


def test_a_source_and_its_target_differ_where_the_edit_is_in_spite_of_jpeg(edit):
    source, target, where = edit
    for jpeg in (lambda image: image, lambda image: worse(image, 0)):
        changed, kept = compare(jpeg(source), jpeg(target))
        assert (changed & where).sum() / (changed | where).sum() > 0.9
        assert (kept & where).mean() < 0.005 and (kept & ~where).sum() / (~where).sum() > 0.9
        assert are_aligned(jpeg(source), jpeg(target), kept)
    changed, kept = compare(source, np.asarray(Image.fromarray(source).filter(ImageFilter.GaussianBlur(1.5))))
    assert not changed.any() and kept.all()


def test_pairs_are_aligned_to_two_pixels(photos, edit):
    source, target, _ = edit

    def aligned(source, target):
        return make_pair(target, [source]).is_aligned

    assert [aligned(moved(source, 0, 0), moved(target, dx, 0)) for dx in (1.5, 2.5, 8)] == [True, False, False]
    assert not aligned(photos[0], np.asarray(Image.fromarray(photos[2]).resize((512, 512))))
    most = source.copy()
    most[:, :480] = np.asarray(Image.fromarray(photos[2]).resize((480, 400)))  # of 600
    assert aligned(source, most)
    plain = np.full((256, 256, 3), 200, np.uint8)  # no detail speaks against it
    square = plain.copy()
    square[100:140, 100:140] = (200, 0, 0)
    assert aligned(plain, square)


def test_an_output_between_source_and_target_scores_its_share(edit):
    source, target, _ = edit
    between = source.astype(np.float32) + np.float32(0.25) * (target.astype(np.float32) - source)
    rows = [score_edit(output, target, [source]) for output in (source, between.round().astype(np.uint8), target)]
    assert [row["edited"] for row in rows] == pytest.approx([0, 0.25, 1], abs=1e-3)
    assert [row["nearer_target"] for row in rows] == [0, 0, 1]
    assert [row["edit_score"] for row in rows] == pytest.approx([0, 0.5, 1], abs=1e-3)
    assert [row["kept_error"] for row in rows] == pytest.approx([0, 0, 0], abs=0.01)
    assert rows[2]["ssim"] == pytest.approx(1) and rows[2]["psnr"] == 100
    assert all(row["drift"] < 0.1 and row["zoom"] < 0.1 for row in rows)


def test_an_edit_the_other_way_is_negative_and_one_too_far_counts_less(edit):
    source, target, _ = (image.astype(np.float32) / 4 + 96 for image in edit)  # room on both sides
    source, target = source.round().astype(np.uint8), target.round().astype(np.uint8)
    change = target.astype(np.float32) - source
    away, far = ((source + factor * change).round().astype(np.uint8) for factor in (-0.5, 1.5))
    away, far = (score_edit(output, target, [source]) for output in (away, far))
    assert (away["edited"], away["edit_score"]) == (pytest.approx(-0.5, abs=0.01), 0)
    assert (far["edited"], far["edit_score"]) == (pytest.approx(1.5, abs=0.01), pytest.approx(0.5**0.5, abs=0.01))


def test_noise_on_the_kept_part_is_its_mean_absolute_value_and_no_edit(edit):
    source, target, where = edit
    noise = np.random.default_rng(0).normal(0, 5, source.shape) * ~where[..., None]
    middle = np.clip(source, 30, 225), np.clip(target, 30, 225)  # nothing is clipped by the noise
    row = score_edit((middle[1] + noise).round().astype(np.uint8), middle[1], [middle[0]])
    assert row["kept_error"] == pytest.approx(5 * math.sqrt(2 / math.pi), rel=0.02)
    assert row["edited"] == pytest.approx(1, abs=0.01)
    assert row["edit_score"] == pytest.approx(math.exp(-row["kept_error"] / 32), abs=0.01)


def test_an_output_that_is_shifted_or_zoomed_is_told_in_pixels(edit):
    source, target, _ = edit
    inner = [moved(image, 0, 0) for image in (source, target)]
    shifted = score_edit(moved(target, 3, 0), inner[1], inner[:1])
    assert (shifted["drift"], shifted["zoom"]) == (pytest.approx(3, abs=0.1), pytest.approx(0, abs=0.1))
    zoomed = score_edit(moved(target, 0, 0, 1.02), inner[1], inner[:1])
    border_px = 0.02 * inner[0].shape[1] / 2
    assert (zoomed["drift"], zoomed["zoom"]) == (pytest.approx(0, abs=0.1), pytest.approx(border_px, abs=0.1))
    assert max(shifted["edit_score"], zoomed["edit_score"]) < 0.95


def test_psnr_is_that_of_the_squared_error(photos):
    target = np.clip(photos[0], 0, 245)
    row = score_edit(target + np.uint8(10), target, [])
    assert row["psnr"] == pytest.approx(20 * math.log10(255 / 10))
    assert row.keys() == {"psnr", "ssim", "edit_score"} and row["edit_score"] == row["ssim"]


def test_an_instruction_is_followed_where_its_own_target_is_nearest(photos):
    target, other = np.full((64, 64, 3), 100, np.uint8), np.full((64, 64, 3), 200, np.uint8)
    for level, own in ((140, 1), (149, 1), (150, 0), (160, 0)):
        output = np.full_like(target, level)
        assert score_edit(output, target, [], others=[other])["own_instruction"] == own
        larger = np.full((96, 96, 3), 200, np.uint8)
        assert score_edit(output, target, [], others=[larger, np.full_like(target, 30)])["own_instruction"] == own
    assert "own_instruction" not in score_edit(target, target, [], others=[target.copy()])


def test_scores_that_a_pair_cannot_have_are_absent(photos, edit):
    source, target, _ = edit
    whole = {"psnr", "ssim", "edit_score"}
    assert score_edit(target, target, [source[:300]]).keys() == whole  # of another aspect
    assert score_edit(source, source, [source]).keys() == whole | {"kept_error", "drift", "zoom"}  # nothing differs
    everything = score_edit(255 - source, 255 - source, [source])
    assert everything.keys() == whole | {"edited", "nearer_target"} and everything["edited"] == 1
    another = np.asarray(Image.fromarray(photos[2]).resize((600, 400)))
    assert score_edit(another, another, [source]).keys() == whole | {"edited", "nearer_target"}


def test_the_last_source_counts_in_the_size_of_the_target(photos, edit):
    source, target, _ = edit
    small = np.asarray(Image.fromarray(source).resize((450, 300), Image.Resampling.LANCZOS))
    row = score_edit(target, target, [photos[0], small])
    assert row["edited"] == 1 and row["kept_error"] == 0 and row["drift"] < 0.2
    with pytest.raises(ValueError, match=r"the output has shape \(300, 450, 3\), the target \(400, 600, 3\)"):
        score_edit(small, target, [source])


def test_the_means_are_over_the_rows_that_have_a_score():
    rows = [{"psnr": 20.0, "ssim": 0.5, "drift": 1.0}, {"ssim": 1.0, "psnr": 30.0}, {"psnr": 40.0}]
    assert aggregate(rows) == {"drift": 1, "psnr": 30, "ssim": 0.75}
    assert aggregate([]) == {}


def test_every_score_is_declared_once_with_what_is_better(edit):
    source, target, _ = edit
    row = score_edit(target, target, [source], others=[source])
    assert list(row) == list(SCORES)
    lower = {name for name, score in SCORES.items() if not score.higher_is_better}
    assert lower == {"kept_error", "drift", "zoom"}
    worst = score_edit(np.roll(source, 9, axis=0), target, [source], others=[source])
    for name in worst.keys() - {"zoom"}:  # a shift is none
        assert (worst[name] < row[name]) == SCORES[name].higher_is_better, name
