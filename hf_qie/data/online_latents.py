"""Training on a set without stored latents: its images are read again, in the sizes of its grids, and encoded.

Letters: B rows, H and W sides in pixels, S tokens, C width of a packed latent.
"""

import os
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset

from hf_qie.config.recipe import Recipe
from hf_qie.data.collate import Batch
from hf_qie.data.images import BadImage, read_image, to_pixels
from hf_qie.data.schema import SOURCES, columns_of
from hf_qie.errors import InputError
from hf_qie.models.base import Family, Grid, read_family
from hf_qie.runtime.device import compute_dtype


def has_latents(data: Dataset) -> bool:
    """Whether latents are stored in a set; they are in all rows or in none."""
    return data.data.column("target_latents").null_count == 0


def made_from(provenance: Mapping[str, Any]) -> list[str]:
    """The folders from which relative paths started when a set was made on this machine; none where it was not."""
    recorded = provenance["record"].get("request", {}).get("image_root", [])
    return [folder for pattern in recorded for folder in ([pattern] if os.path.isdir(pattern) else glob(pattern))]


def with_files(data: Dataset, *, task: str, roots: Sequence[str]) -> Dataset:
    """A set with its images named by file; relative paths start from one of `roots`.

    Raises InputError naming the first file that is missing, or that lies under two roots.
    """
    known: dict[str, str] = {}
    rows, fingerprint = data["row"], data._fingerprint  # which stays: the same set for all who compare it
    for image in columns_of("image"):
        files = []
        for row, paths in zip(rows, data[image.name], strict=True):
            for path in image.each(paths):
                if path not in known:
                    known[path] = _find(path, roots, where=f"tasks.{task}", row=row)
            named = [known[path] for path in image.each(paths)]
            files.append(named if image.many else named[0])
        data = data.remove_columns(image.name)
        data = data.add_column(image.name, files, feature=image.type, new_fingerprint=fingerprint)
    return data


def _find(path: str, roots: Sequence[str], *, where: str, row: int) -> str:
    found = [file for file in (os.path.join(root, path) for root in roots) if os.path.isfile(file)]
    if len(found) == 1:
        return found[0]
    problem = f"lies in {' and in '.join(sorted(roots))}" if found else f"is not in {' or '.join(sorted(roots))}"
    raise InputError(
        f"{where}: its embedding set has no latents, so training reads its images, but {path} (row {row}) {problem}; "
        f"set {where}.image_root to their folder, or extract with extract.latents: true"
    )


def read_pixels(file: str, grid: Grid, family: Family) -> np.ndarray:
    """`[H, W, channels]` uint8, an image as extraction shows it to the VAE; raises BadImage naming the file."""
    height, width = grid
    try:
        image = read_image(Path(file), family.image_mode)
    except BadImage as error:
        raise BadImage(f"{file}: {error}") from error
    return np.asarray(family.resize(image, (family.pixels_per_token * width, family.pixels_per_token * height)))


def encode_images(batch: Batch, encoder: Any, *, batch_size: int) -> None:
    """Put latents `[B, S, C]` float16, as a set stores them, in place of a batch's `images`."""
    encoded = []
    for images in batch.pop("images"):
        latents = [one for part in images.split(batch_size) for one in encoder(to_pixels(part))]
        encoded.append(torch.stack(latents).to(torch.float16))
    none, rest = encoded[0][:, :0], iter(encoded)
    for column in columns_of("latents"):
        count = len(batch["grids"]) - 1 if column.of == SOURCES else 1
        batch[column.name] = torch.cat([none, *(next(rest) for _ in range(count))], dim=1)


def placed(batch: Batch, device: torch.device, encoder: Any, *, batch_size: int) -> Batch:
    """A collated batch on `device`; images, if it has any, are encoded in the dtype of extraction.

    From pinned memory it is copied while the device computes and the host goes on.
    """
    batch = send_to_device(batch, device, non_blocking=device.type == "cuda")
    if "images" in batch:
        encode_images(batch, encoder, batch_size=batch_size)
    return batch


def load_vae(recipe: Recipe, device: torch.device) -> Any:
    """The checkpoint's VAE, as extraction loads it."""
    family = read_family(recipe.model, revision=recipe.revision)
    dtype = compute_dtype(recipe.extract.dtype, device)
    return family.load_vae(recipe.model, revision=recipe.revision, dtype=dtype, device=device)
