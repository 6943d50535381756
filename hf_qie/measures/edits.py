"""How well an edit was made, by numbers alone: of an output, its target and its sources.

Images are uint8 `[H, W, 3]`; errors and thresholds are in their 256 levels.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from skimage.metrics import structural_similarity
from skimage.morphology import closing, dilation, footprint_rectangle, opening

from hf_qie.measures.registration import Registration, register

ASPECT = 0.01  # how far the aspect of the last source may be from the target's to be compared with it
SAME_LEVELS = 8  # a smaller difference of blurred images is noise of JPEG and VAE, or a change of the whole tone
CELLS = 256  # across the shorter side: what differs is found on cells of so many pixels
BLUR = 0.01  # of the shorter side, at least one pixel, before differences are taken
ALIGNED_PX = 2.0  # a pair is aligned if no pixel is farther from its place
MIN_SHARE = 0.001  # of the pixels, below which a part of an image has no score
MIN_KEPT = 0.05  # of the pixels, which less than four windows fit into
KEPT_LEVELS = 16.0  # of kept_error, with which an output counts for 1/e
MOST_DB = 100.0  # PSNR of equal images


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score as it is logged, tabulated and compared."""

    name: str
    unit: str  # "" where it has none
    higher_is_better: bool
    meaning: str


def _score(name: str, unit: str, meaning: str, *, higher_is_better: bool = True) -> tuple[str, Score]:
    return name, Score(name=name, unit=unit, higher_is_better=higher_is_better, meaning=meaning)


# In the order of a table. The mean of those that are 0 or 1 is the share of rows.
SCORES: dict[str, Score] = dict(
    [
        _score("edit_score", "", "edited and kept_error in one number, 0 to 1; where a pair has no such parts, ssim"),
        _score("edited", "", "share of the change from source to target that happened: 0 none, 1 all"),
        _score("nearer_target", "", "1 where the output is nearer to the target than to the source"),
        _score("own_instruction", "", "1 where the output is nearest to the target of its own instruction"),
        _score(
            "kept_error", "levels", "mean absolute error where source and target are equal", higher_is_better=False
        ),
        _score("drift", "px", "how far the output is shifted against the source", higher_is_better=False),
        _score("zoom", "px", "how far scaling moves the border of the output", higher_is_better=False),
        _score("psnr", "dB", "peak signal-to-noise ratio of output and target"),
        _score("ssim", "", "structural similarity of output and target, 1 where they are equal"),
    ]
)
# Of a vision-language model, which score.py alone has: models/judge.py.
JUDGED: dict[str, Score] = dict(
    [
        _score("judge", "", "judge_followed, judge_preserved and judge_quality in one number, 0 to 10"),
        _score("judge_followed", "", "the instruction was carried out, 0 to 10"),
        _score("judge_preserved", "", "what it does not name is as in the sources, 0 to 10"),
        _score("judge_quality", "", "the output looks natural and has no faults, 0 to 10"),
        _score("judge_mass", "", "share of the judge's probability that is on the answers it may give"),
    ]
)
KNOWN = SCORES | JUDGED
# Of edits that a run was not trained for, beside those above (hub/regression.py).
FOREIGN: dict[str, Score] = dict(
    [
        _score("changed", "levels", "mean absolute difference of output and source", higher_is_better=False),
        _score("base_psnr", "dB", "of the output to what the base makes of the row: how far training moved it"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A target and the source that it is compared with, in its size."""

    target: np.ndarray
    source: np.ndarray
    changed: np.ndarray  # bool [H, W]: source and target differ
    kept: np.ndarray  # bool [H, W]: they are equal, some pixels away from those that differ
    is_aligned: bool  # what is in both is in the same place


def score_edit(
    output: np.ndarray, target: np.ndarray, sources: Sequence[np.ndarray], *, others: Sequence[np.ndarray] = ()
) -> dict[str, float]:
    """The scores in `SCORES` that are defined for a row, by name.

    Of several sources the last one counts, as the pipelines take its shape. `others` are the targets of other
    instructions on the same sources. Which scores of a row are defined depends on source and target, so that the means
    of two checkpoints are over the same rows; only `drift` and `zoom` need an output that can be registered.

    - psnr: 10 log10(255² / mean squared error), at most 100.
    - ssim: of luminance, with the Gaussian window of 1.5 px of Wang et al. 2004, "Image quality assessment: from error
      visibility to structural similarity".
    - edited: <output - source, target - source> / |target - source|² over the pixels that differ: the share in a least
      squares sense, so that noise does not count; beyond 1 the output goes too far, below 0 the other way.
    - nearer_target: whether |output - target|² < |output - source|² there, which is the same as edited > 1/2.
    - kept_error: mean |output - target| over the pixels that source and target share.
    - drift, zoom: `register` of the output against the source over these pixels.
    - own_instruction: whether the mean squared error to the target is below that to each of `others`. By chance it is
      1 / (1 + number of others).
    - edit_score: sqrt(e * k) with e = 1 - |1 - edited|, at least 0, and k = exp(-kept_error / 16): a half edit, or one
      that goes half too far, and 11 levels of error each halve what is under the root. Where either is missing, ssim,
      at least 0.

    Sources of another aspect (by 1 %) give none of edited, nearer_target, kept_error, drift and zoom; pairs that are
    not aligned, or have no pixel in common, none of the last three; pairs that do not differ none of the first two.
    """
    if output.shape != target.shape:
        raise ValueError(f"the output has shape {output.shape}, the target {target.shape}")
    scores = {"psnr": psnr(output, target), "ssim": ssim(output, target)}
    if others := [other for other in others if other.shape != target.shape or (other != target).any()]:
        errors = [_squared_error(output, resized(other, target.shape)) for other in others]
        scores["own_instruction"] = float(_squared_error(output, target) < min(errors))
    if pair := make_pair(target, sources):
        scores |= _scores_of_parts(output, pair)
    if {"edited", "kept_error"} <= scores.keys():
        happened = max(0.0, 1 - abs(1 - scores["edited"]))
        scores["edit_score"] = math.sqrt(happened * math.exp(-scores["kept_error"] / KEPT_LEVELS))
    else:
        scores["edit_score"] = max(0.0, scores["ssim"])
    return {name: scores[name] for name in SCORES if name in scores}


def aggregate(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score over the rows that have it, in the order of `KNOWN` and `FOREIGN`."""
    rows = list(rows)
    values = {name: [row[name] for row in rows if name in row] for name in KNOWN | FOREIGN}
    return {name: math.fsum(some) / len(some) for name, some in values.items() if some}


def make_pair(target: np.ndarray, sources: Sequence[np.ndarray]) -> Pair | None:
    """The target and the last source; None without sources, or where its aspect is another."""
    if not sources or not same_aspect(sources[-1], target):
        return None
    source = resized(sources[-1], target.shape)
    changed, kept = compare(source, target)
    return Pair(target=target, source=source, changed=changed, kept=kept, is_aligned=are_aligned(source, target, kept))


def same_aspect(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the aspects of two images differ by at most 1 %."""
    aspects = sorted(image.shape[1] / image.shape[0] for image in (one, other))
    return aspects[1] / aspects[0] - 1 <= ASPECT


def compare(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where two images of one size differ and where they are equal, bool `[H, W]` each; some pixels are neither.

    Both are averaged over cells, 256 across the shorter side, and blurred by a hundredth of it, which takes noise and
    sharpness away from the difference: of photos against themselves as JPEG of quality 50, or blurred by 1.5 px with
    noise of 2 levels, no cell then differs by 8 levels in any channel. What differs by more is opened by 3 cells and
    closed by 5; within 2 cells of it nothing counts as equal.
    """
    height, width = source.shape[:2]
    cell = max(1, min(height, width) // CELLS)
    blur = ImageFilter.GaussianBlur(max(1, BLUR * min(height, width)) / cell)
    small = [Image.fromarray(image).reduce(cell).filter(blur) for image in (source, target)]
    apart = np.abs(np.asarray(small[0], np.int16) - np.asarray(small[1], np.int16)).max(axis=2) > SAME_LEVELS
    changed = closing(opening(apart, footprint_rectangle((3, 3))), footprint_rectangle((5, 5)))
    near = dilation(changed | apart, footprint_rectangle((5, 5)))
    changed, near = (some.repeat(cell, 0).repeat(cell, 1)[:height, :width] for some in (changed, near))
    return changed, ~near


def are_aligned(source: np.ndarray, target: np.ndarray, kept: np.ndarray) -> bool:
    """Whether what is in both images of one size is in the same place, to 2 px.

    By their registration; of images without detail in common, aligned are those with equal pixels, `kept`.
    """
    found = register_pair(source, target, kept)
    return found.farthest_px <= ALIGNED_PX if found.is_known else not found.can_tell and _is_enough(kept)


def register_pair(source: np.ndarray, target: np.ndarray, kept: np.ndarray | None = None) -> Registration:
    """`register` the target against the source; where most differs and no motion is known, on the equal pixels alone.

    These are `kept` of `compare`; pixels with detail that are equal say that nothing moved.
    """
    found = register(target, source)
    if found.is_known or not found.can_tell:
        return found
    kept = compare(source, target)[1] if kept is None else kept
    if kept.mean() < MIN_KEPT:
        return found
    on_kept = register(target, source, kept)
    return on_kept if on_kept.is_known else found


def psnr(output: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, at most 100."""
    error = _squared_error(output, target)
    return min(MOST_DB, 10 * math.log10(255**2 / error)) if error else MOST_DB


def ssim(output: np.ndarray, target: np.ndarray) -> float:
    """Structural similarity of luminance, -1 to 1."""
    one, other = (np.asarray(Image.fromarray(image).convert("L"), np.float32) for image in (output, target))
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(one, other, data_range=255, **gaussian))


def resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The image in the height and width of `shape`."""
    if image.shape[:2] == shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.LANCZOS))


def _scores_of_parts(output: np.ndarray, pair: Pair) -> dict[str, float]:
    """The scores that are over the pixels that source and target share, or over the others."""
    scores = {}
    if _is_enough(pair.changed):
        source, target, made = (image[pair.changed].astype(np.float32) for image in (pair.source, pair.target, output))
        wanted = target - source
        scores["edited"] = float(((made - source) * wanted).sum() / (wanted**2).sum())
        scores["nearer_target"] = float(scores["edited"] > 0.5)
    if pair.is_aligned and _is_enough(pair.kept):
        error = np.abs(output[pair.kept].astype(np.float32) - pair.target[pair.kept])
        scores["kept_error"] = float(error.mean())
        found = register(output, pair.source, pair.kept)
        if found.is_known:
            scores["drift"] = found.drift_px
        if not math.isnan(found.zoom_px):
            scores["zoom"] = found.zoom_px
    return scores


def _is_enough(part: np.ndarray) -> bool:
    return bool(part.mean() > MIN_SHARE)


def _squared_error(one: np.ndarray, other: np.ndarray) -> float:
    return float(((one.astype(np.float32) - other) ** 2).mean(dtype=np.float64))
