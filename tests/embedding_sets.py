"""Embedding sets of random numbers for tests: the columns and files that extract.py leaves, without its models."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_qie.data.provenance import PROVENANCE, checkpoint_compat
from hf_qie.data.schema import set_features
from hf_qie.models.base import read_family

WIDTH, LATENT_WIDTH = 96, 64  # of the tiny checkpoints' embeddings and latents


def write_set(folder: Path, model: Path, *, rows: int = 8, grids=((4, 4), (2, 4)), target_mean: float = 0) -> Path:
    """A set of `rows` rows of one shape, the target's grid and each source's; prompts differ in length."""
    random = np.random.default_rng(0)

    def matrix(num_tokens: int, width: int, mean: float = 0) -> list:
        return (mean + random.standard_normal((num_tokens, width))).astype(np.float16).tolist()

    target, *sources = grids
    prompt_columns = read_family(str(model)).prompt_columns
    num_source_tokens = sum(height * width for height, width in sources)
    columns = {
        "row": range(rows),
        "source_image": [[f"{row}_{i}.png" for i in range(len(sources))] for row in range(rows)],
        "target_image": [f"{row}.png" for row in range(rows)],
        "instruction": [f"edit {row}" for row in range(rows)],
        "num_sources": [len(sources)] * rows,
        **_shared([matrix(3 * len(sources), WIDTH) for _ in range(rows)], len(sources), prompt_columns),
        "text_embeds_instruction": [matrix(4 + row % 3, WIDTH) for row in range(rows)],
        "text_embeds_drop": [matrix(3, WIDTH) for _ in range(rows)],
        "target_latents": [matrix(target[0] * target[1], LATENT_WIDTH, target_mean) for _ in range(rows)],
        "target_grid": [list(target)] * rows,
        "source_latents": [matrix(num_source_tokens, LATENT_WIDTH) for _ in range(rows)],
        "source_grids": [[list(grid) for grid in sources]] * rows,
    }
    features = set_features(
        width=WIDTH,
        latent_width=LATENT_WIDTH,
        captions=["instruction"],
        inverse_captions=(),
        inverse_latents=False,
        prompt_columns=prompt_columns,
    )
    Dataset.from_dict(columns, features=features).save_to_disk(folder)
    compat = checkpoint_compat(str(model), revision=None, family=read_family(str(model)))
    compat |= {"vae_area_px": 1024 * 1024, "drop_caption": " "}
    provenance = {"compat": compat, "record": {"model": str(model)}}
    (folder / PROVENANCE).write_text(json.dumps(provenance), encoding="utf-8")
    return folder


def _shared(embeds: list, num_sources: int, prompt_columns: Sequence[str]) -> dict[str, list]:
    """The columns of what captions share, `embeds` of each row: three before each of its images, or of it."""
    slots = [[3 * n + 2 for n in range(num_sources)]] * len(embeds)
    return dict(zip(prompt_columns, (embeds, slots), strict=False))


def write_recipe(folder: Path, model: Path, **sections: dict) -> Path:
    """Two tasks, their sets, and a recipe of four steps of four draws on the CPU, with `sections` put over it."""
    for name, grids in (("edit", ((4, 4), (2, 4))), ("text_to_image", ((4, 6),))):
        if not (folder / "sets" / name).exists():
            write_set(folder / "sets" / name, model, grids=grids)
    recipe = {
        "model": str(model),
        "tasks": {name: {"data": f"{name}.jsonl"} for name in ("edit", "text_to_image")},
        "extract": {"output_dir": str(folder / "sets")},
        "mix": {"same_shape": 4},
        "training": {
            "output_dir": str(folder / "run"),
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "logging_steps": 1,
            "save_steps": 2,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
        },
    }
    for name, section in sections.items():
        section = recipe.get(name, {}) | section
        recipe[name] = {key: value for key, value in section.items() if value is not None}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path
