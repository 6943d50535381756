"""Pictures from what was trained, or from the model before training, through the official diffusers pipeline.

    python hf_qie/sampling.py recipe.yaml [key.of.the.recipe=value ...] --instruction "Make the sky red."
        [--image a.png ...] --output b.png [--checkpoint FOLDER] [--seed 0]
        [--num_inference_steps N] [--true_cfg_scale 4.0]

--image: once for each picture to edit, in their order; without one, text-to-image. --checkpoint: training.output_dir,
which is also where it looks without one, a checkpoint-N in it, a LoRA file, a folder with a LoRA or a transformer, or
`base`, the model as it was before training. --num_inference_steps (or --steps): the pipeline's own number if not
given. --true_cfg_scale (or --cfg): 1 is no guidance.

The picture has the size that the recipe trains on: its area is that of the square of extract.image_sample_size, its
shape that of the picture to edit, of several the last. From Python:

    from hf_qie.sampling import Sampler

    sampler = Sampler("recipe.yaml")
    sampler("Make the sky red.", images=["a.png"], seed=0).save("b.png")
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.errors import InputError
from hf_qie.runtime.cli import Options, check, run_script, to_path, wanted
from hf_qie.runtime.rules import Count, Seed, Side, Weight

if TYPE_CHECKING:
    from PIL import Image

    from hf_qie.models.qwen_image.prompts import Prompt
    from hf_qie.models.qwen_image.text_encoder import Encoder, PromptStates

logger = logging.getLogger("hf_qie.sampling")  # run by path, this module is __main__

BASE = "base"  # in place of a checkpoint: the model before training
CFG_SCALE = 4.0  # of the official pipelines


def main(argv: list[str]) -> None:
    """Make one picture."""
    parser = Options()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--checkpoint", type=to_path)
    parser.add_argument("--image", type=to_path, action="append", default=[])
    parser.add_argument("--instruction", required=True)
    parser.add_argument("--output", type=to_path, required=True)
    parser.add_argument("--seed", type=wanted(Seed), default=0)
    parser.add_argument("--num_inference_steps", "--steps", type=wanted(Count))
    parser.add_argument("--true_cfg_scale", "--cfg", type=wanted(Weight), default=CFG_SCALE)
    given = parser.parse_intermixed_args(argv)
    recipe = load_recipe(given.recipe, given.overrides)
    check_output(given.output)
    sampler = Sampler(recipe, checkpoint=given.checkpoint)
    options = {name: getattr(given, name) for name in ("seed", "num_inference_steps", "true_cfg_scale")}
    sampler.check(**options)
    images = sampler.read(given.image)
    states = sampler.states(given.instruction, images)
    del sampler.encoder  # its 16 GB are free before the transformer comes
    sampler.picture(states, images, **options).save(given.output)
    logger.info("%s", given.output)


def check_output(path: Path) -> None:
    """Raise InputError where no picture could be saved as `path`."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"--output: {path}: wanted the name of a picture, as out.png")
    if not path.parent.is_dir():
        raise InputError(f"--output: {path.parent} is no folder; make it, or name another")


class Sampler:
    """The official pipeline of a recipe's model with what was trained; models load when they are first needed.

    Prompt states are ours: present releases of diffusers lose the 3-D positions of pictures, which training had.
    A call is `read`, `states` and `picture`, for those who have one of them already.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        *,
        checkpoint: str | Path | None = None,
    ):
        """`checkpoint`: as on the command line.

        Raises InputError where there are no weights, or the family allows no such extract.source_sample_size.
        """
        from hf_qie.hub.trained_run import find_weights
        from hf_qie.models.base import read_family
        from hf_qie.runtime.device import compute_dtype, own_device

        self.recipe = recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        self.family = read_family(recipe.model, revision=recipe.revision)
        self.source_area_px = self.family.source_area_px(recipe.extract.source_sample_size)
        self.weights = None
        if str(checkpoint) != BASE:
            self.weights = find_weights(Path(checkpoint or recipe.training["output_dir"]))
        self.device = own_device()
        self.dtype = compute_dtype(recipe.extract.dtype, self.device)

    def __call__(
        self, instruction: str, *, images: "Sequence[str | Path | Image.Image]" = (), **options: Any
    ) -> "Image.Image":
        """What `instruction` makes of `images`, or of nothing; `options` are those of `picture`.

        Raises InputError, before a model is loaded, for an instruction or pictures that the pipeline cannot take.
        """
        self.check(**options)
        pictures = self.read(images)
        return self.picture(self.states(instruction, pictures), pictures, **options)

    def read(self, images: "Sequence[str | Path | Image.Image]") -> "list[Image.Image]":
        """The pictures to edit, upright and in RGB; raises InputError for too many, or one that cannot be read."""
        from PIL import Image

        from hf_qie.data.images import BadImage, read_image

        most = self.family.max_sources
        if most is not None and len(images) > most:
            raise InputError(f"--image: {len(images)} of them, but {self.family.pipeline} takes {most or 'none'}")
        pictures = []
        for image in images:
            try:
                pictures.append(read_image(image if isinstance(image, Image.Image) else Path(image)))
            except BadImage as error:
                raise InputError(f"--image: {image}: {error}") from error
        return pictures

    def states(self, instruction: str, images: "Sequence[Image.Image]") -> "PromptStates":
        """Prompt states of `instruction` and of the negative prompt, extract.drop_caption, over the same `images`.

        Raises InputError, before the encoder is loaded, for an instruction that is blank or too long.
        """
        prompt = self._prompt(instruction, images)
        return self.encoder([prompt])[0]

    def picture(
        self,
        states: "PromptStates",
        images: "Sequence[Image.Image]",
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        true_cfg_scale: float = CFG_SCALE,
        size: tuple[int, int] | None = None,
    ) -> "Image.Image":
        """The pipeline's picture from `states`, whose two texts are the instruction and the negative prompt.

        The same `seed` gives the same picture. `size` (width, height) in pixels, if not the recipe's.
        """
        import torch

        self.check(seed=seed, num_inference_steps=num_inference_steps, true_cfg_scale=true_cfg_scale, size=size)
        pipeline = self.pipeline if images else self.text_to_image
        width, height = size or self.size(images)
        options: dict[str, Any] = {"height": height, "width": width, "true_cfg_scale": true_cfg_scale}
        options["generator"] = torch.Generator().manual_seed(seed)  # of the CPU, so that devices agree on the noise
        if num_inference_steps is not None:
            options["num_inference_steps"] = num_inference_steps
        for name, text in zip(("prompt_embeds", "negative_prompt_embeds"), states.texts, strict=True):
            embeds = torch.cat([states.image, text])[None].to(self.device, self.dtype)
            options |= {name: embeds, f"{name}_mask": torch.ones(embeds.shape[:2], device=self.device).long()}
        if true_cfg_scale <= 1:  # the pipeline would warn of a negative prompt that it does not use
            options = {name: value for name, value in options.items() if not name.startswith("negative")}
        if not images:  # else it cuts at 512, and training does not
            return pipeline(max_sequence_length=1024, **options).images[0]
        with sources_at(self.source_area_px):
            return pipeline(image=images[0] if self.family.one_resize else list(images), **options).images[0]

    def check(
        self,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        true_cfg_scale: float = CFG_SCALE,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Raise InputError for options of `picture` that the pipeline cannot take, before a model is loaded."""
        from hf_qie.models.checkpoint import check_steps

        check(seed, Seed, "seed")
        check(true_cfg_scale, Weight, "true_cfg_scale")
        if num_inference_steps is not None:
            check(num_inference_steps, Count, "num_inference_steps")
            check_steps(num_inference_steps, self.recipe, "num_inference_steps")
        for side_px in size or ():
            check(side_px, Side, "size")

    def size(self, images: "Sequence[Image.Image]") -> tuple[int, int]:
        """(width, height) in pixels of what `images` become: the recipe's area, the shape of the pipeline's choice."""
        from hf_qie.data.images import area_size

        return area_size(images[-1].size if images else (1, 1), self.recipe.extract.image_sample_size**2)

    def _prompt(self, instruction: str, images: "Sequence[Image.Image]") -> "Prompt":
        """The prompt as extraction makes it."""
        from hf_qie.data.images import area_size, resize
        from hf_qie.data.samples import BadRow
        from hf_qie.extraction.preprocess import check_length
        from hf_qie.models.qwen_image.prompts import BadPrompt, make_prompt
        from hf_qie.models.qwen_image.vae import grid_of

        if not instruction.strip():
            raise InputError("--instruction: is blank; say what the picture should become")
        seen = [resize(image, area_size(image.size, self.family.vlm_area_px)) for image in images]
        captions = [instruction, self.recipe.extract.drop_caption]
        try:
            prompt = make_prompt(self.processor, self.family.template(len(images)), seen, captions)
            num_states = len(prompt.shared) - prompt.drop + max(map(len, prompt.branches))
            grids = [grid_of(area_size(image.size, self.source_area_px)) for image in images]
            check_length({"": num_states}, grids, grid_of(self.size(images)))
        except (BadPrompt, BadRow) as error:
            raise InputError(f"--instruction: {error}") from error
        return prompt

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's processor, or its tokenizer."""
        from hf_qie.models.qwen_image.text_encoder import load_processor

        return load_processor(self.recipe.model, family=self.family, revision=self.recipe.revision)

    @cached_property
    def encoder(self) -> "Encoder":
        """The prompt encoder; it may be deleted, and comes back when it is needed."""
        from hf_qie.models.qwen_image.text_encoder import Encoder

        where = {"revision": self.recipe.revision, "dtype": self.dtype, "device": self.device}
        return Encoder(self.recipe.model, **where)

    @cached_property
    def pipeline(self) -> Any:
        """The official pipeline of the family without its prompt encoder, with what was trained in it."""
        import diffusers

        model, named = self.recipe.model, {"revision": self.recipe.revision}
        trained = self.weights if self.weights and self.weights.is_dir() else None
        where = {} if trained else {"revision": self.recipe.revision, "subfolder": "transformer"}
        transformer = diffusers.QwenImageTransformer2DModel.from_pretrained(
            trained or model, use_safetensors=True, dtype=self.dtype, **where
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler", **named)
        vae = diffusers.AutoencoderKLQwenImage.from_pretrained(
            model, subfolder="vae", use_safetensors=True, dtype=self.dtype, **named
        )
        absent = ("text_encoder", "tokenizer", "processor") if self.family.edit else ("text_encoder", "tokenizer")
        pipeline = getattr(diffusers, self.family.pipeline)(
            transformer=transformer, vae=vae, scheduler=scheduler, **dict.fromkeys(absent)
        )
        if self.weights and not trained:
            load_lora(pipeline, self.weights)
        pipeline.set_progress_bar_config(disable=None)
        what = f"with {self.weights}" if self.weights else "as it was before training"
        logger.info("%s of %s, %s", self.family.pipeline, model, what)
        if self.source_area_px != self.family.vae_area_px:
            told = "sources of %s pixels, as in training; the stock pipeline shows its VAE %s"
            logger.info(told, f"{self.source_area_px:,}", f"{self.family.vae_area_px:,}")
        return pipeline.to(self.device)

    @cached_property
    def text_to_image(self) -> Any:
        """The same as QwenImagePipeline: those that edit need a picture."""
        import diffusers

        if self.family.edit is None:
            return self.pipeline
        parts = {name: part for name, part in self.pipeline.components.items() if name != "processor"}
        pipeline = diffusers.QwenImagePipeline(**parts)
        pipeline.set_progress_bar_config(disable=None)
        return pipeline


def load_lora(pipeline: Any, path: Path) -> None:
    """Put the LoRA in the file `path` into `pipeline`; raises InputError unless all of it has found its place."""
    from hf_qie.models.qwen_image.lora_files import read_lora

    where = f"--checkpoint: {path}"
    tensors, metadata = read_lora(path, where=where)
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


@contextmanager
def sources_at(area_px: int) -> Iterator[None]:
    """Let QwenImageEditPlusPipeline show its VAE sources of that area; the constant of its module decides."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    stock, module.VAE_IMAGE_SIZE = module.VAE_IMAGE_SIZE, area_px
    try:
        yield
    finally:
        module.VAE_IMAGE_SIZE = stock


if __name__ == "__main__":
    run_script(main)
