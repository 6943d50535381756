"""RUN 3: what a run has trained, as others load it.

    python hf_qie/export.py outputs/run [--to lora|comfyui|merged|pipeline] [--output FOLDER] [--dtype float32]
    python hf_qie/export.py outputs/run --push_to_hub org/name [--public] [--license apache-2.0]

The first argument is training.output_dir, of which the last whole weights are taken, or a checkpoint-N in it; the run
may have trained adapters or the transformer itself, sharded or not, and may have been interrupted.

    lora      pytorch_lora_weights.safetensors for diffusers' load_lora_weights; what a LoRA becomes unless told
    comfyui   one file for ComfyUI's LoRA loader
    merged    a transformer for QwenImageTransformer2DModel.from_pretrained; what full fine-tuning becomes unless told
    pipeline  a whole checkpoint for DiffusionPipeline.from_pretrained

It is written to FOLDER, by default <output_dir>/export/<kind>, in bfloat16, read back and compared, with a model card.
--push_to_hub puts the folder into a model repository, private unless --public.
"""

import argparse
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_qie.recipe import InputError, run_script

logger = logging.getLogger("hf_qie.export")
KINDS = ("lora", "comfyui", "merged", "pipeline")
DTYPES = ("bfloat16", "float32")


def main(argv: list[str]) -> None:
    """Export what `argv[0]` has trained."""
    asked = arguments(argv)
    import torch

    from hf_qie.formats import EXPORTS
    from hf_qie.trained import find_trained

    trained = find_trained(asked.checkpoint)
    kind = asked.to or ("lora" if trained.recipe.trainable.lora else "merged")
    # of a checkpoint that was asked for by name, by that name
    named = kind if asked.checkpoint.resolve() == trained.output_dir.resolve() else f"{kind}-{trained.step}"
    output = asked.output or trained.output_dir / "export" / named
    logger.info("%s: step %s of %s", kind, f"{trained.step:,}", trained.folder)
    with room_for(output) as aside:
        checked = EXPORTS[kind](trained, aside, dtype=getattr(torch, asked.dtype))
    logger.info("%s: written, read back and compared: %s", output, checked)


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(usage=__doc__, add_help=False)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--to", choices=KINDS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    return parser.parse_args(argv)


@contextmanager
def room_for(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, which it becomes once all is written; InputError where something is there."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output: {output} is there and not empty; remove it, or name another folder")
    aside = output.with_name(f"{output.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.replace(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    run_script(main)
