"""Images from what was trained, or from the model before training, through the official diffusers pipeline.

    python hf_qie/sampling.py recipe.yaml [key.of.the.recipe=value ...] --instruction "Make the sky red."
        [--image a.png ...] --output b.png [--checkpoint FOLDER] [--seed 0]
        [--num_inference_steps N] [--true_cfg_scale S]

--image: once for each image to edit, in their order; without one, text-to-image. --checkpoint: training.output_dir,
which is also the default, a checkpoint-N in it, a LoRA file, a folder with a LoRA or a transformer, or `base`, the
model before training. --num_inference_steps (or --steps) and --true_cfg_scale (or --cfg): default, the pipeline's
own; a scale of 1 is no guidance. --output: its ending tells the format; in one without alpha, as .jpg, what is
transparent stands on white.

The image has the size that the recipe trains on: its area is that of the square of extract.image_sample_size, its
aspect that of the image to edit, of several the last. From Python:

    from hf_qie.sampling import Sampler

    sampler = Sampler("recipe.yaml")
    sampler("Make the sky red.", images=["a.png"], seed=0).save("b.png")
"""

import logging
from pathlib import Path
from typing import Any

from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.runtime.cli import Options, checked, run_script
from hf_qie.runtime.rules import Seed, Steps, Weight


def main(argv: list[str]) -> None:
    """Generate one image."""
    parser = Options()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--image", type=Path, action="append", default=[])
    parser.add_argument("--instruction", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=checked(Seed), default=0)
    parser.add_argument("--num_inference_steps", "--steps", type=checked(Steps))
    parser.add_argument("--true_cfg_scale", "--cfg", type=checked(Weight))
    given = parser.parse_intermixed_args(argv)
    recipe = load_recipe(given.recipe, given.overrides)
    _check_output(given.output)
    from hf_qie.data.images import save_image
    from hf_qie.hub.sampler import Sampler

    sampler = Sampler(recipe, checkpoint=given.checkpoint)
    options = {name: getattr(given, name) for name in ("seed", "num_inference_steps", "true_cfg_scale")}
    images = sampler.read(given.image)
    embeddings = sampler.embed(given.instruction, images)
    del sampler.encoder  # its 16 GB are free before the transformer is loaded
    save_image(sampler.generate(embeddings, images, **options), given.output)
    logging.getLogger("hf_qie.sampling").info("saved: %s", given.output)


def _check_output(path: Path) -> None:
    from PIL import Image

    from hf_qie.data.images import writes

    format = Image.registered_extensions().get(path.suffix.lower())
    if format is None or not writes(format, "RGB"):
        raise InputError(f"--output: {path}: expected the name of an image, as out.png")
    if not path.parent.is_dir():
        raise InputError(f"--output: the folder {path.parent} does not exist; make it, or name another")


def __getattr__(name: str) -> Any:
    """`Sampler`, which imports torch, for `from hf_qie.sampling import Sampler`."""
    if name != "Sampler":
        raise AttributeError(name)
    from hf_qie.hub.sampler import Sampler

    return Sampler


if __name__ == "__main__":
    run_script(main)
