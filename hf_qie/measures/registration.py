"""How far the content of one image is shifted and scaled against another: subpixel, in spite of a part that is edited.

Phase correlation (Kuglin and Hines 1975) of many small windows, each of which gives the shift of its own content, and
the one motion that most of them follow. So a part that differs needs no mask, and the scale is in how shifts grow with
the distance from the centre. The log-polar spectrum of a whole image (Reddy and Chatterji 1996) has been tried: it is
off by some 5 px at the border, and 9 with an edit, which changes the magnitudes of all frequencies.

Measured on ten photos of 0.5 megapixels against themselves, shifted by 0 to 12 px, scaled by 0.95 to 1.05, blurred by
1 px, with noise of 2 levels, 10 % lighter and as JPEG of quality 75, ten times each. With 30 % of the area pasted over
from another photo 99 of 100 motions were found; the translation was off by 0.02 px in the median, 0.07 in 95 of 100
and 0.12 at most, the border by scaling by 0.03, 0.12 and 0.23. With 50 % pasted over 25 of 100 were not known, and the
others off by at most 0.2 and 0.3 px. Of 100 pairs of different photos none was taken for the same.

Letters: N windows, W side of a window in px.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

WINDOW_PX = 64  # W
# Shorter side in px at which both images are compared, distance between windows, and how far the shift of a window
# may be from the motion that it follows: the first finds the motion, the others refine it; smaller images are enlarged
PASSES = ((256, 32, 1.0), (256, 32, 0.5), (512, 64, 0.5))
MAX_ZOOM = 0.15  # |scale - 1| that is looked for
MAX_PAIRS = 1000  # of windows, each of which proposes a motion
NOISE = 2.0  # levels; standard deviation of what is taken for noise of JPEG, VAE and diffusion
MIN_DETAIL = 1.0  # levels a px, in every direction: a flat window has no shift, an edge none along itself
MIN_WINDOWS = 4  # that agree
MIN_AGREEMENT = 0.3  # of the windows with detail; unrelated photos reach 0.14
MAX_ERROR_PX = 0.5  # standard error at the border, in px of a pass, with which a scale is still told

HANN = np.hanning(WINDOW_PX + 2)[1:-1, None] * np.hanning(WINDOW_PX + 2)[1:-1]
# Gaussian low-pass with a deviation of 1 px: it makes the peak of a shift a Gaussian, exact between pixels
LOW_PASS = np.exp(-2 * math.pi**2 * np.add.outer(np.fft.fftfreq(WINDOW_PX) ** 2, np.fft.rfftfreq(WINDOW_PX) ** 2))
HANN, LOW_PASS = HANN.astype(np.float32), LOW_PASS.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What is at p in `fixed`, in px from its centre, is at `scale * p + (dx, dy)` in `moving`."""

    dx_px: float  # to the right; not a number where no motion is known
    dy_px: float  # down; the same
    scale_x: float  # not a number where no motion is known, or the windows are too few or too close to tell it
    scale_y: float
    size_px: tuple[int, int]  # width and height of both images
    agreement: float  # share of the windows with detail in both images that follow this motion, 0 to 1
    num_windows: int  # with detail in both images

    @property
    def is_known(self) -> bool:
        """Whether there is a motion that enough windows follow."""
        return not math.isnan(self.dx_px)

    @property
    def can_tell(self) -> bool:
        """Whether both images have detail enough in common places: if no motion is known then, they disagree."""
        return self.num_windows >= MIN_WINDOWS

    @property
    def drift_px(self) -> float:
        """Length of the translation."""
        return math.hypot(self.dx_px, self.dy_px)

    @property
    def zoom_px(self) -> float:
        """How far scaling alone moves the border that it moves most."""
        width, height = self.size_px
        return max(abs(self.scale_x - 1) * width / 2, abs(self.scale_y - 1) * height / 2)

    @property
    def farthest_px(self) -> float:
        """How far the motion moves the pixel that it moves most, a corner; by the translation if no scale is known."""
        width, height = self.size_px
        zooms = (0.0 if math.isnan(scale) else abs(scale - 1) for scale in (self.scale_x, self.scale_y))
        x, y = (zoom * side / 2 for zoom, side in zip(zooms, (width, height), strict=True))
        return math.hypot(abs(self.dx_px) + x, abs(self.dy_px) + y)


def register(moving: np.ndarray, fixed: np.ndarray, mask: np.ndarray | None = None) -> Registration:
    """Register two images of one size, uint8 `[H, W, 3]`, where `mask[H, W]` bool, if given, is true.

    No motion is known (`is_known`) where fewer than four windows, or a fifth of those with detail, agree on one: flat
    images, and images of different things.
    """
    height, width = fixed.shape[:2]
    images = [Image.fromarray(image).convert("L") for image in (moving, fixed)]
    if mask is not None:
        images.append(Image.fromarray(mask.astype(np.uint8) * 255))
    motion, told = np.zeros((2, 2)), np.zeros(2, bool)  # translation in px and scale - 1, of x and y; is it told
    for number, (side, stride, tolerance) in enumerate(PASSES):
        ratio = max(min(side, width, height), PASSES[0][0]) / min(width, height)
        size = round(width * ratio), round(height * ratio)
        centres, shifts = _measure([_resized(one, size) for one in images], motion * [[ratio], [1]], stride)
        follow = _search(centres, shifts, tolerance) if number == 0 else _near(shifts, 2 * tolerance)
        step, follow, told = _fit(centres, shifts, follow, tolerance, half_px=np.array(size) / 2)
        motion = np.stack([motion[0] + (1 + motion[1]) * step[0] / ratio, (1 + motion[1]) * (1 + step[1]) - 1])
        agreement = float(np.mean(follow)) if len(follow) else 0.0
        if follow.sum() < MIN_WINDOWS or agreement < MIN_AGREEMENT:
            motion, told = np.full((2, 2), math.nan), np.zeros(2, bool)
            break
    scale_x, scale_y = np.where(told, 1 + motion[1], math.nan)
    return Registration(
        dx_px=float(motion[0, 0]),
        dy_px=float(motion[0, 1]),
        scale_x=float(scale_x),
        scale_y=float(scale_y),
        size_px=(width, height),
        agreement=agreement,
        num_windows=len(shifts),
    )


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC).convert("F")


def _moved_back(image: Image.Image, motion: np.ndarray) -> Image.Image:
    """The image with what is at `scale * p + d` at p."""
    (dx, dy), (zoom_x, zoom_y) = motion
    width, height = image.size
    matrix = (1 + zoom_x, 0, dx - zoom_x * width / 2, 0, 1 + zoom_y, dy - zoom_y * height / 2)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def _measure(images: list[Image.Image], motion: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Of windows with detail, their centres `[N, 2]` from that of the image, and their shifts `[N, 2]`, x and y, px.

    `images` are moving, with `motion` so far, fixed, and a mask or none, in one size.
    """
    moving, fixed, *mask = images
    size = np.array(fixed.size)
    xs, ys = (np.arange((side - WINDOW_PX) % stride // 2, side - WINDOW_PX + 1, stride) for side in size)
    starts = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    moving, fixed = (_cut(image, starts) for image in (_moved_back(moving, motion), fixed))
    good = np.minimum(_detail(moving), _detail(fixed)) > MIN_DETAIL
    if mask:
        good &= _cut(mask[0], starts).mean(axis=(1, 2)) > 255 / 2
    return starts[good] + WINDOW_PX / 2 - size / 2, _shifts(moving[good], fixed[good])


def _cut(image: Image.Image, starts: np.ndarray) -> np.ndarray:
    """Windows `[N, W, W]` at `starts[N, 2]`, x and y."""
    return np.lib.stride_tricks.sliding_window_view(np.asarray(image), (WINDOW_PX,) * 2)[starts[:, 1], starts[:, 0]]


def _detail(windows: np.ndarray) -> np.ndarray:
    """Root mean square slope `[N]` of each window in the direction of its least, in levels a px (Shi, Tomasi 1994)."""
    down, right = np.gradient(windows, axis=(1, 2))
    pairs = (right, right), (down, down), (right, down)
    xx, yy, xy = (np.einsum("nij,nij,ij->n", *pair, HANN / HANN.sum(), optimize=True) for pair in pairs)
    return np.sqrt(np.maximum((xx + yy) / 2 - np.hypot((xx - yy) / 2, xy), 0))


def _shifts(moving: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Shifts `[N, 2]`, x and y in px, of windows `[N, W, W]`: the peak of their phase correlation.

    Frequencies count as far as their power is above that of `NOISE`, as in a Wiener filter.
    """
    rows, power = np.arange(len(fixed)), NOISE**2 * (HANN**2).sum()
    one, other = (np.fft.rfft2((some - some.mean(axis=(1, 2), keepdims=True)) * HANN) for some in (moving, fixed))
    cross = one * other.conj()
    # the phase turns by pi where an edit inverts the colours
    peaks = np.abs(np.fft.irfft2(cross * (LOW_PASS / (np.abs(cross) + power)), s=(WINDOW_PX,) * 2))
    y, x = np.divmod(peaks.reshape(len(rows), WINDOW_PX**2).argmax(axis=1), WINDOW_PX)
    logs = np.log(np.maximum(peaks, np.finfo(np.float32).tiny))

    def vertex(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Where the parabola through three logarithms is highest, -1/2 to 1/2."""
        return (after - before) / np.maximum(2 * (2 * logs[rows, y, x] - before - after), 1e-6)

    x_part = vertex(logs[rows, y, x - 1], logs[rows, y, (x + 1) % WINDOW_PX])
    y_part = vertex(logs[rows, y - 1, x], logs[rows, (y + 1) % WINDOW_PX, x])
    return (np.stack([x + x_part, y + y_part], axis=1) + WINDOW_PX / 2) % WINDOW_PX - WINDOW_PX / 2


def _near(off: np.ndarray, tolerance: float) -> np.ndarray:
    return (off**2).sum(axis=-1) < tolerance**2


def _search(centres: np.ndarray, shifts: np.ndarray, tolerance: float) -> np.ndarray:
    """Which windows `[N]` bool follow the motion with the most followers, of those that pairs of windows propose."""
    one, other = np.triu_indices(len(shifts), 1)
    some = np.linspace(0, len(one) - 1, min(len(one), MAX_PAIRS)).astype(int)
    one, other = one[some], other[some]
    apart, moved = centres[other] - centres[one], shifts[other] - shifts[one]
    zoom = (apart * moved).sum(axis=1) / (apart**2).sum(axis=1)
    one, other, zoom = (values[np.abs(zoom) < MAX_ZOOM] for values in (one, other, zoom))
    if not len(zoom):
        return np.zeros(len(shifts), bool)
    zoom = zoom[:, None, None]
    start = (shifts[one] + shifts[other])[:, None] / 2 - zoom * (centres[one] + centres[other])[:, None] / 2
    follow = _near(shifts - start - zoom * centres, tolerance)
    return follow[follow.sum(axis=1).argmax()]


def _fit(
    centres: np.ndarray, shifts: np.ndarray, follow: np.ndarray, tolerance: float, *, half_px: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares over the windows that follow, and again over those that follow then.

    Returns the motion, translation and scale - 1 of x and y, which windows follow, and of which axis the scale is
    told: not where its standard error is too large at the border, `half_px` from the centre, and then it is 1.
    """
    motion, told = np.zeros((2, 2)), np.zeros(2, bool)
    for _ in range(3):
        if follow.sum() < MIN_WINDOWS:
            break
        at, moved = centres[follow], shifts[follow]
        middle, mean = at.mean(axis=0), moved.mean(axis=0)
        spread = ((at - middle) ** 2).sum(axis=0)
        zoom = ((at - middle) * moved).sum(axis=0) / np.maximum(spread, 1)
        error = np.maximum((moved - mean - zoom * (at - middle)).std(axis=0), tolerance / 2)
        told = half_px * error < MAX_ERROR_PX * np.sqrt(spread)
        zoom = np.where(told, zoom, 0)
        motion = np.stack([mean - zoom * middle, zoom])
        follow = _near(shifts - motion[0] - motion[1] * centres, tolerance)
    return motion, follow, told
