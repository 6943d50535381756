"""What a step is given: checkpoints of configs alone, sets of random numbers in memory, recipes; released or small.

Released are the shapes of Qwen-Image-Edit-2509, and of Qwen-Image-2.1 the defaults of diffusers' class. A row has one
source of 1024 x 1024 pixels and a caption of 50 tokens. Small ones let a CPU run the same code in seconds.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from datasets import Dataset
from diffusers import QwenImage21Transformer2DModel
from gpu.results import Result
from released import SCHEDULER, write_released

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.data.largest import Shape
from hf_qie.data.schema import set_features, to_table
from hf_qie.models.base import Grid, read_family

EDIT, EDIT_21 = "QwenImageEditPlusPipeline", "QwenImage21Pipeline"
# embeddings before the caption; of Qwen-Image-2.1 those of text alone, with the source's latents behind the ninth
SHARED, SLOTS = {EDIT: 5 + 1 + 196 + 1, EDIT_21: 10}, {EDIT: 0, EDIT_21: 9}
TEXT = 50 + 5  # of the caption, and behind it
ROWS = 8
SMALL = {"num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 4, "axes_dims_rope": [4, 6, 6]}
WIDTHS = {EDIT: "joint_attention_dim", EDIT_21: "context_in_dim"}


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where a step works, and on what."""

    folder: Path  # its own, removed at its end
    device: torch.device
    small: bool = False
    earlier: Sequence[Result] = ()  # of the steps before


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to train adapters of rank 32 on one row a step."""

    pipeline: str = EDIT
    target_px: int = 512
    draws_per_row: int = 1
    memory: Mapping[str, Any] | None = None  # the recipe's section
    training: Mapping[str, Any] | None = None  # over the defaults

    def shrunk(self) -> "Case":
        """The same for a CPU."""
        memory = dict(self.memory or {})
        if "stream_blocks" in memory:
            memory["stream_blocks"] = 3  # of four
        training = {**self.training, "torch_compile_backend": "aot_eager"} if self.training else None
        return replace(self, target_px=self.target_px // 16, memory=memory, training=training)

    def grids(self, *, small: bool) -> tuple[Grid, Grid]:
        """Of the target and of the source, 16 pixels a token in both families."""
        return (self.target_px // 16,) * 2, (4, 4) if small else (64, 64)

    @property
    def num_tokens(self) -> int:
        """Embeddings of a prompt."""
        return SHARED[self.pipeline] + TEXT

    def shape(self, *, small: bool) -> Shape:
        """Of a micro-batch."""
        return Shape(grids=self.grids(small=small), num_tokens=self.num_tokens, draws_per_row=self.draws_per_row)


def checkpoint(folder: Path, pipeline: str, *, small: bool) -> Path:
    """A checkpoint of which there is nothing but the pipeline's name and the configs of transformer and scheduler."""
    write_released(folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    path = folder / "transformer" / "config.json"
    if pipeline == EDIT_21:
        with init_empty_weights():
            QwenImage21Transformer2DModel().save_config(folder / "transformer")
    if small:
        shape = SMALL | {WIDTHS[pipeline]: 96}
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | shape))
    assert SCHEDULER["use_dynamic_shifting"], "sigmas depend on the size"
    return folder


def recipe_of(case: Case, context: Context, *, max_steps: int) -> Recipe:
    """The recipe of a case; nothing is saved, and nothing logged before the end."""
    training = {
        "output_dir": str(context.folder / "run"),
        "use_cpu": context.device.type == "cpu",
        "bf16": True,
        "learning_rate": 1e-5,
        "max_steps": max_steps,
        "per_device_train_batch_size": case.draws_per_row,
        "activation_checkpointing": True,
        "logging_steps": 1000,
        "save_strategy": "no",
        "disable_tqdm": True,
        **(case.training or {}),
    }
    recipe = {
        "model": str(checkpoint(context.folder / "model", case.pipeline, small=context.small)),
        "tasks": {"edit": {"embeddings": "in memory"}},
        "mix": {"same_shape": 1, "draws_per_row": case.draws_per_row, "caption_dropout": 0.0},
        "trainable": {"lora": {"rank": 32, "alpha": 32, "target_modules": "attention"}},
        "memory": dict(case.memory or {}),
        "training": training,
    }
    path = context.folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return load_recipe(path)


def set_of(case: Case, recipe: Recipe, *, small: bool) -> Dataset:
    """Rows of one shape, in memory; their numbers differ."""
    family = read_family(recipe.model)
    config = json.loads(Path(recipe.model, "transformer", "config.json").read_text(encoding="utf-8"))
    latent_width, width = family.widths(config)
    target, source = case.grids(small=small)
    rng = np.random.default_rng(0)

    def matrix(length: int, width: int) -> np.ndarray:
        return rng.standard_normal((length, width), np.float32).astype(np.float16)

    shared, slots = SHARED[case.pipeline], [SLOTS[case.pipeline]]
    rows = [
        {
            "row": row,
            "source_image": [f"{row}_source.png"],
            "target_image": f"{row}_target.png",
            "instruction": "edit",
            "num_sources": 1,
            **dict(zip(family.prompt_columns, (matrix(shared, width), slots), strict=False)),
            "text_embeds_instruction": matrix(TEXT, width),
            "text_embeds_drop": matrix(6, width),
            "target_latents": matrix(math.prod(target), latent_width),
            "target_grid": list(target),
            "source_latents": matrix(math.prod(source), latent_width),
            "source_grids": [list(source)],
        }
        for row in range(ROWS)
    ]
    features = set_features(
        width=width,
        latent_width=latent_width,
        captions=["instruction"],
        inverse_captions=(),
        inverse_latents=False,
        prompt_columns=family.prompt_columns,
    )
    return Dataset(to_table(rows, features))
