"""Training on a set without stored latents: its images are read again, in the sizes that its grids say, and encoded.

Letters: B rows, H and W sides in pixels.
"""

import os
from collections.abc import Mapping, Sequence
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_qie.config.recipe import Recipe
from hf_qie.data.collate import Batch
from hf_qie.data.images import BadImage, read_image, resize
from hf_qie.data.schema import SOURCES, columns_of
from hf_qie.errors import InputError
from hf_qie.models.qwen_image.vae import PIXELS_PER_TOKEN, LatentEncoder
from hf_qie.runtime.device import compute_dtype


def has_latents(data: Dataset) -> bool:
    """Whether latents are stored in a set; they are in all rows or in none."""
    return data.data.column("target_latents").null_count == 0


def made_from(provenance: Mapping[str, Any]) -> list[str]:
    """Where relative paths started when a set was made on this machine; nothing where it was not."""
    recorded = provenance["record"].get("request", {}).get("image_root", [])
    return [folder for pattern in recorded for folder in ([pattern] if os.path.isdir(pattern) else glob(pattern))]


def with_files(data: Dataset, *, task: str, roots: Sequence[str]) -> Dataset:
    """A set with its images named by file; relative paths start from one of `roots`.

    Raises InputError naming the first file that is missing, or that lies under two roots.
    """
    known: dict[str, str] = {}
    images = columns_of("image")
    columns = data.select_columns(["row", *(image.name for image in images)])[:]
    for row, path in (
        (row, path)
        for image in images
        for row, paths in zip(columns["row"], columns[image.name], strict=True)
        for path in image.each(paths)
        if path not in known
    ):
        files = {os.path.join(root, path) for root in roots}
        found = [file for file in files if os.path.isfile(file)]
        if len(found) != 1:
            some = f"lies in {' and in '.join(sorted(roots))}" if found else f"is not in {' or '.join(sorted(roots))}"
            raise InputError(
                f"tasks.{task}: its embedding set has no latents, so training reads its images, but {path} (row "
                f"{row}) {some}; set tasks.{task}.image_root to their folder, or extract with extract.latents: true"
            )
        known[path] = found[0]
    fingerprint = data._fingerprint  # the same set for all who compare it
    for image in images:
        paths = columns[image.name]
        files = [[known[path] for path in some] if image.many else known[some] for some in paths]
        data = data.remove_columns(image.name)
        data = data.add_column(image.name, files, feature=image.type, new_fingerprint=fingerprint)
    return data


def read_pixels(file: str, grid: tuple[int, int]) -> np.ndarray:
    """`[H, W, 3]` uint8, an image as extraction shows it to the VAE; raises BadImage naming the file."""
    height, width = grid
    try:
        image = read_image(Path(file))
    except BadImage as error:
        raise BadImage(f"{file}: {error}") from error
    return np.asarray(resize(image, (PIXELS_PER_TOKEN * width, PIXELS_PER_TOKEN * height)))


def encode_images(batch: Batch, encoder: LatentEncoder, *, batch_size: int) -> None:
    """Put latents `[B, S, 64]` float16, as a set stores them, in place of a batch's images `[B, H, W, 3]` uint8."""
    encoded = []
    for image in batch.pop("images"):
        parts = [encoder(to_pixels(part)) for part in image.split(batch_size)]
        encoded.append(torch.stack(list(chain.from_iterable(parts))).to(torch.float16))
    none, rest = encoded[0][:, :0], iter(encoded)
    for column in columns_of("latents"):
        count = len(batch["grids"]) - 1 if column.of == SOURCES else 1
        batch[column.name] = torch.cat([none, *(next(rest) for _ in range(count))], dim=1)


def to_pixels(images: Tensor) -> Tensor:
    """`[B, 3, H, W]` float32 in [-1, 1] of `[B, H, W, 3]` uint8, by the arithmetic of `images.to_pixels`."""
    return 2.0 * (images.float() / 255.0).permute(0, 3, 1, 2) - 1.0


def load_vae(recipe: Recipe, device: torch.device) -> LatentEncoder:
    """The checkpoint's VAE, as extraction loads it."""
    dtype = compute_dtype(recipe.extract.dtype, device)
    return LatentEncoder(recipe.model, revision=recipe.revision, dtype=dtype, device=device)
