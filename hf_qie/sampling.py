"""Edit a picture with what was trained, through the official pipeline.

    python hf_qie/sampling.py recipe.yaml --image a.png [--image b.png] --instruction "..." --output out.png
        [--checkpoint FOLDER] [--seed 0] [--steps 50] [--cfg 4.0] [key.of.the.recipe=value ...]

FOLDER is training.output_dir, which is also the default, a checkpoint-N in it, or what export.py left; `base` is the
model as it was before training. Without a picture the text alone is drawn. --steps and --cfg are the pipeline's own
defaults; the negative prompt is extract.drop_caption over the same pictures, which caption dropout trained.

The class of the pipeline is used as it is, but handed our prompt states: its own lose the 3-D positions of pictures.
"""

import argparse
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_qie.recipe import InputError, Recipe, load_recipe, run_script

logger = logging.getLogger("hf_qie.sampling")

BASE = "base"


def main(argv: list[str]) -> None:
    """Make one picture as the command line asks."""
    parser = argparse.ArgumentParser(usage=__doc__, add_help=False)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--checkpoint")
    parser.add_argument("--image", type=Path, action="append", default=[])
    parser.add_argument("--instruction", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--cfg", type=float, default=4.0)
    asked = parser.parse_intermixed_args(argv)
    recipe = load_recipe(asked.recipe, asked.overrides)
    if asked.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--output: got {str(asked.output)!r}, wanted a file name that ends in .png, .jpg or .webp")
    from hf_qie.images import BadImage, read_image

    images = []
    for path in asked.image:
        try:
            images.append(read_image(path))
        except BadImage as error:
            raise InputError(f"--image: {path}: {error}") from error
    sampler = Sampler(recipe, asked.checkpoint)
    picture = sampler(
        asked.instruction, images, seed=asked.seed, num_inference_steps=asked.steps, true_cfg_scale=asked.cfg
    )
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(asked.output)
    logger.info("%s: %d x %d pixels", asked.output, *picture.size)


class Sampler:
    """The official pipeline around what was trained; the encoder is loaded with the first prompt.

        sampler = Sampler(load_recipe("recipe.yaml"))
        sampler("Make the sky red.", [Image.open("a.png")], seed=0).save("out.png")

    Args:
        recipe: names the base model, the sizes that were trained at, and the dtype of the arithmetic.
        checkpoint: where the weights are; None: `training.output_dir`; "base": the model before training.

    Raises InputError where there are no weights.
    """

    def __init__(self, recipe: Recipe, checkpoint: str | Path | None = None):
        import diffusers
        import torch

        from hf_qie.family import read_family

        self.recipe = recipe
        self.family = read_family(recipe.model, revision=recipe.revision)
        weights = None if checkpoint == BASE else weights_at(Path(checkpoint or recipe.training["output_dir"]))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, recipe.extract.dtype)
        where = {"revision": recipe.revision, "dtype": self.dtype, "use_safetensors": True}
        parts: dict[str, Any] = {"text_encoder": None}
        if weights and weights.is_dir():
            parts["transformer"] = diffusers.QwenImageTransformer2DModel.from_pretrained(
                weights, dtype=self.dtype, use_safetensors=True
            )
        pipeline_class = getattr(diffusers, self.family.pipeline)
        self.pipeline = pipeline_class.from_pretrained(recipe.model, **parts, **where).to(self.device)
        self.pipeline.set_progress_bar_config(disable=None)
        if weights and weights.is_file():
            self.pipeline.load_lora_weights(str(weights.parent), weight_name=weights.name)
        self._encoder: Any = None

    def __call__(
        self,
        instruction: str,
        images: Sequence[Any] = (),
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        true_cfg_scale: float = 4.0,
    ) -> Any:
        """The picture, an RGB PIL image of the size that targets were trained at, near the aspect of the source.

        `images` are PIL images in the order of their numbers in the instruction, none for text-to-image. Raises
        InputError where the family takes another number, or the instruction cannot be encoded.
        """
        import torch

        from hf_qie.images import to_rgb

        images = [to_rgb(image) for image in images]
        width, height = self.output_size(images)
        pipeline = self._pipeline_for(images)
        steps = num_inference_steps or inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
        shown = {} if not images else {"image": images[0] if self.family.max_sources == 1 else images}
        with trained_source_area(self.recipe):
            made = pipeline(
                **shown,
                **self.prompt_states(instruction, images, negative=true_cfg_scale > 1),
                width=width,
                height=height,
                num_inference_steps=steps,
                true_cfg_scale=true_cfg_scale,
                generator=torch.Generator().manual_seed(seed),
            )
        return made.images[0]

    def prompt_states(self, instruction: str, images: Sequence[Any], *, negative: bool) -> dict[str, Any]:
        """The pipeline's `prompt_embeds` `[1, L, D]` and their mask, and those of the negative prompt."""
        import torch

        from hf_qie.encoder import Encoder, load_processor
        from hf_qie.images import area_size, resize
        from hf_qie.prompts import BadPrompt, make_prompt

        recipe, family = self.recipe, self.family
        if (family.edit is None and images) or (family.max_sources == 1 and len(images) > 1):
            raise InputError(f"--image: got {len(images)}, but {family.pipeline} takes at most {family.max_sources}")
        if self._encoder is None:
            on = {"revision": recipe.revision, "dtype": self.dtype, "device": self.device}
            self._processor = load_processor(recipe.model, family=family, revision=recipe.revision)
            self._encoder = Encoder(recipe.model, **on)
        seen = [resize(image, area_size(image.size, family.vlm_area_px)) for image in images]
        texts = {"": instruction} | ({"negative_": recipe.extract.drop_caption} if negative else {})
        try:
            prompt = make_prompt(self._processor, family.template(len(images)), seen, list(texts.values()))
        except BadPrompt as error:
            raise InputError(f"--instruction: {error}") from error
        (states,) = self._encoder([prompt])
        given = {}
        for prefix, text in zip(texts, states.texts, strict=True):
            embeds = torch.cat([states.image, text])[None].clone()  # no inference tensor reaches the pipeline
            given[f"{prefix}prompt_embeds"] = embeds
            given[f"{prefix}prompt_embeds_mask"] = torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device)
        return given

    def output_size(self, images: Sequence[Any]) -> tuple[int, int]:
        """(width, height) in pixels: the area that targets were trained at, the aspect of the pipeline's choice."""
        from hf_qie.images import area_size

        area_px = self.recipe.extract.image_sample_size**2
        if not images:
            return area_size((1, 1), area_px)
        return area_size(images[-1].size, area_px)  # the first of one, the last of several, as the pipelines have it

    def _pipeline_for(self, images: Sequence[Any]) -> Any:
        """An edit pipeline takes no call without a picture; the text-to-image one is made of the same parts."""
        from diffusers import QwenImagePipeline

        if images or isinstance(self.pipeline, QwenImagePipeline):
            return self.pipeline
        names = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
        return QwenImagePipeline(**{name: getattr(self.pipeline, name) for name in names})


def weights_at(path: Path) -> Path:
    """A LoRA file, or the folder of a transformer, that `path` holds; raises InputError where it holds neither."""
    from hf_qie.model import LORA_FILE, TRANSFORMER_FOLDER
    from hf_qie.trained import find_trained

    if path.is_file() and path.suffix == ".safetensors":
        return path
    if not path.is_dir():
        raise InputError(
            f"--checkpoint: there is no {path}; wanted training.output_dir of a run, a checkpoint-N in it, what "
            f"export.py left, or {BASE}"
        )
    is_run = (path / "recipe.yaml").exists() or path.name.startswith("checkpoint-")
    folder = find_trained(path).folder if is_run else path
    for name in (LORA_FILE, f"{TRANSFORMER_FOLDER}/config.json", "config.json"):
        if (folder / name).is_file():
            return (folder / name) if name == LORA_FILE else (folder / name).parent
    raise InputError(
        f"--checkpoint: {folder} holds neither {LORA_FILE} nor a transformer; of a sharded checkpoint they are made "
        f"by `python hf_qie/export.py {folder}`"
    )


@contextmanager
def trained_source_area(recipe: Recipe) -> Iterator[None]:
    """Let the Edit-Plus pipeline show its VAE the area that sources were trained at; it is a constant of its module."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    stock = module.VAE_IMAGE_SIZE
    module.VAE_IMAGE_SIZE = (recipe.extract.source_sample_size or 0) ** 2 or stock
    try:
        yield
    finally:
        module.VAE_IMAGE_SIZE = stock


if __name__ == "__main__":
    run_script(main)
