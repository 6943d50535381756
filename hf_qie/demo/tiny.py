"""A tiny checkpoint and synthetic edits, for the demo and the tests; nothing is downloaded.

    python hf_qie/demo/tiny.py [--model outputs/tiny] [--kind edit_plus] [--data outputs/shapes] [--rows 64]
        [--held_out 12]

--model: the folder for the checkpoint, which loads in the official diffusers pipeline of its kind (edit_plus,
edit_plus_2511, edit, text_to_image, learner, qwen_image_21, qwen_image_21_no_causal_condition,
qwen_image_21_learner). --data: the folder for two tasks of synthetic edits, --rows of each, and behind these all
edits of --held_out images that are in no other row: two to repaint each, one to its negative. The VAE is trained, but
for Qwen-Image-2.1, all else is random. The kinds with `learner` can be trained to edit in minutes on a CPU.
"""

import logging
import random
from collections.abc import Iterator
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from hf_qie.demo.shapes import PALETTE, SHAPES, TASKS, held_out_edits, synthetic_edits
from hf_qie.models.base import family_of
from hf_qie.runtime.cli import Options, checked, run_script
from hf_qie.runtime.rules import Count, Whole

logger = logging.getLogger("hf_qie.demo.tiny")

KINDS = {  # the pipeline of the family, and its variant
    "edit_plus": ("QwenImageEditPlusPipeline", ""),  # like Qwen-Image-Edit-2509
    "edit_plus_2511": ("QwenImageEditPlusPipeline", "2511"),
    "edit": ("QwenImageEditPipeline", ""),
    "text_to_image": ("QwenImagePipeline", ""),
    "learner": ("QwenImageEditPlusPipeline", "learner"),
    "qwen_image_21": ("QwenImage21Pipeline", ""),
    "qwen_image_21_no_causal_condition": ("QwenImage21Pipeline", "no_causal_condition"),
    "qwen_image_21_learner": ("QwenImage21Pipeline", "learner"),
}


def _texts() -> Iterator[str]:
    """The words of the synthetic edits."""
    for make in TASKS.values():
        yield from (make(random.Random(i), i, 64).captions["instruction"] for i in range(100))
    # words, not sentences: Chinese has no spaces, so that a whole sentence would become one token
    yield from (chinese for table in (PALETTE, SHAPES) for chinese, _ in table.values())


def tiny_checkpoint(folder: Path, *, kind: str = "edit_plus", seed: int = 0) -> Path:
    """Write a checkpoint of one of `KINDS`, the same bytes for the same seed; return `folder`."""
    pipeline, variant = KINDS[kind]
    family_of(pipeline).save_tiny(folder, texts=_texts(), variant=variant, seed=seed)
    return folder


def main(argv: list[str]) -> None:
    """Build what the command line asks for and log where it lies."""
    parser = Options()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="edit_plus")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=checked(Count), default=64)
    parser.add_argument("--held_out", type=checked(Whole), default=0)
    args = parser.parse_args(argv)
    disable_progress_bar()  # a bar for one file of a megabyte
    if args.model:
        logger.info("%s checkpoint: %s", args.kind, tiny_checkpoint(args.model, kind=args.kind))
    if args.data:
        for task, path in synthetic_edits(args.data, rows=args.rows).items():
            logger.info("%d rows of %s: %s", args.rows, task, path)
        held_out_edits(args.data, images=args.held_out)


if __name__ == "__main__":
    run_script(main)
