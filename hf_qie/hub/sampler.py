"""`Sampler`: images from what was trained, or from the model before training, through the official pipeline."""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.data.images import BadImage, read_image
from hf_qie.errors import InputError
from hf_qie.extraction.plan import family_of_recipe
from hf_qie.hub.trained_run import find_weights
from hf_qie.models.base import Family
from hf_qie.models.lora_files import read_lora
from hf_qie.models.prompts import BadPrompt, PromptEmbeddings
from hf_qie.runtime.device import compute_dtype, own_device
from hf_qie.runtime.rules import Section, Seed, Steps, Weight, validate

logger = logging.getLogger("hf_qie.sampling")

BASE = "base"  # in place of a checkpoint: the model before training


class SamplingOptions(Section):
    """What an image depends on beside the instruction and the images to edit."""

    seed: Seed = 0
    num_inference_steps: Steps | None = None  # the pipeline's own
    true_cfg_scale: Weight | None = None  # the pipeline's own; 1: no guidance


class Sampler:
    """The official pipeline of a recipe's model with what was trained; models load when they are first needed.

    Prompt embeddings are ours: present releases of diffusers lose the 3-D positions of images, which training had.
    A call is `read`, `embed` and `generate`, for those who have one of them already.
    """

    def __init__(self, recipe: Recipe | str | Path, *, checkpoint: str | Path | None = None):
        """`checkpoint`: as on the command line of sampling.py.

        Raises InputError where there are no weights, or the family allows no such extract.source_sample_size.
        """
        self.recipe = recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        self.where = {"revision": recipe.revision}
        self.family = family_of_recipe(recipe)
        self.weights = None
        if str(checkpoint) != BASE:
            self.weights = find_weights(Path(checkpoint or recipe.training["output_dir"]))
        self.device = own_device()
        self.dtype = compute_dtype(recipe.extract.dtype, self.device)

    def __call__(
        self, instruction: str, *, images: Sequence[str | Path | Image.Image] = (), **options: Any
    ) -> Image.Image:
        """What `instruction` makes of `images`, or of nothing; `options` are `SamplingOptions`.

        Raises InputError, before a model is loaded, for an instruction or images that the pipeline cannot take.
        """
        validate(SamplingOptions, options)
        sources = self.read(images)
        return self.generate(self.embed(instruction, sources), sources, **options)

    def read(self, images: Sequence[str | Path | Image.Image]) -> list[Image.Image]:
        """The images to edit, upright and in the family's mode.

        Raises InputError for too many, or one that cannot be read.
        """
        most = self.family.max_sources
        if most is not None and len(images) > most:
            raise InputError(f"--image: {len(images)} of them, but {self.family.pipeline} takes {most or 'none'}")
        sources = []
        for image in images:
            try:
                sources.append(
                    read_image(image if isinstance(image, Image.Image) else Path(image), self.family.image_mode)
                )
            except BadImage as error:
                raise InputError(f"--image: {image}: {error}") from error
        return sources

    def embed(self, instruction: str, images: Sequence[Image.Image]) -> PromptEmbeddings:
        """Embeddings of `instruction` and of the negative prompt, extract.drop_caption, over the same `images`.

        Raises InputError, before the encoder is loaded, for an instruction that is blank or too long.
        """
        if not instruction.strip():
            raise InputError("--instruction: is blank; describe the edit")
        family = self.family
        try:
            prompt = family.make_prompt(self.processor, images, [instruction, self.recipe.extract.drop_caption])
        except BadPrompt as error:
            raise InputError(f"--instruction: {error}") from error
        grids = [family.grid_of(family.fit(image.size, family.vae_area_px)) for image in images]
        most, number = family.most_tokens(grids, family.grid_of(self.size(images))), max(prompt.num_embeddings)
        if number > most:
            raise InputError(f"--instruction: {number} tokens of images and text, at most {most} can be placed")
        return self.encoder([prompt])[0]

    def generate(
        self,
        embeddings: PromptEmbeddings,
        images: Sequence[Image.Image],
        *,
        size: tuple[int, int] | None = None,
        **options: Any,
    ) -> Image.Image:
        """The pipeline's image from `embeddings`, whose two texts are the instruction and the negative prompt.

        `options` are `SamplingOptions`; the same `seed` gives the same image. `size` (width, height) in pixels, if not
        the recipe's.
        """
        chosen = validate(SamplingOptions, options)
        own = {"true_cfg_scale": self.family.true_cfg_scale}
        return self.family.generate(
            self.pipeline,
            embeddings,
            images,
            size=size or self.size(images),
            generator=torch.Generator().manual_seed(chosen.seed),  # of the CPU, so that devices agree on the noise
            **own | chosen.model_dump(exclude={"seed"}, exclude_none=True),
        )

    def size(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        """(width, height) in pixels of what `images` become: the recipe's area, the shape of the pipeline's choice."""
        return self.family.fit(images[-1].size if images else (1, 1), self.recipe.extract.image_sample_size**2)

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's processor, or its tokenizer."""
        return self.family.load_processor(self.recipe.model, **self.where)

    @cached_property
    def encoder(self) -> Any:
        """The prompt encoder; it may be deleted, and comes back when it is needed."""
        return self.family.load_encoder(self.recipe.model, dtype=self.dtype, device=self.device, **self.where)

    @cached_property
    def pipeline(self) -> Any:
        """The official pipeline of the family without its prompt encoder, with what was trained in it."""
        model, folder = self.recipe.model, self.weights if self.weights and self.weights.is_dir() else None
        pipeline = self.family.load_pipeline(model, transformer=folder, dtype=self.dtype, **self.where)
        if self.weights and not folder:
            load_lora(pipeline, self.weights, self.family)
        what = f"with {self.weights}" if self.weights else "before training"
        logger.info("%s of %s, %s", self.family.pipeline, model, what)
        return pipeline.to(self.device)


def load_lora(pipeline: Any, path: Path, family: Family) -> None:
    """Put the LoRA in the file `path` into `pipeline`; raises InputError unless all of it has found its place."""
    where = f"--checkpoint: {path}"
    tensors, metadata = read_lora(path, where=where, convert=family.convert_lora)
    try:
        pipeline.load_lora_into_transformer(
            tensors, transformer=pipeline.transformer, metadata=metadata, _pipeline=pipeline
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{where} does not load as a LoRA of this model: {error}") from error
    loaded = sum(".lora_" in name for name, _ in pipeline.transformer.named_parameters())
    if loaded != len(tensors):  # diffusers leaves out what it does not know, with a log line at most
        raise InputError(
            f"{where}: of its {len(tensors)} tensors diffusers has loaded {loaded}; it is a LoRA of another model"
        )
