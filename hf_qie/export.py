"""RUN 3: export what a run has trained to a format that other tools load.

    python hf_qie/export.py outputs/run [--to lora|comfyui|merged|pipeline] [--output FOLDER] [--dtype float32]
    python hf_qie/export.py outputs/run --push_to_hub org/name [--public] [--license apache-2.0]

The first argument is training.output_dir, whose last complete weights are exported, or a checkpoint-N in it. The run
may have trained adapters or the transformer itself, sharded or not, and may have been interrupted.

    lora      pytorch_lora_weights.safetensors for diffusers' load_lora_weights; the default for a LoRA
    comfyui   one file for ComfyUI's LoRA loader
    merged    a transformer for its class in diffusers; the default for full fine-tuning
    pipeline  a complete checkpoint for DiffusionPipeline.from_pretrained

The export is written to FOLDER, by default <output_dir>/export/<kind>, or <kind>-N of a checkpoint-N, in bfloat16,
with a model card and, where the base has a restricted licence, its notice in NOTICE and the base's own file LICENSE;
then it is read back and compared.
--push_to_hub uploads the folder to a model repository, private unless --public.
"""

import logging
import shutil
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_qie.errors import InputError
from hf_qie.runtime.cli import Options, run_script

logger = logging.getLogger("hf_qie.export")


def main(argv: list[str]) -> None:
    """Export what `argv[0]` has trained."""
    given = parse_arguments(argv)
    import torch

    from hf_qie.hub.export_formats import EXPORTS, write_license
    from hf_qie.hub.model_card import IMAGES, model_card
    from hf_qie.hub.publish import CARD, open_model_repo, push_model
    from hf_qie.hub.trained_run import find_trained

    trained, repo = find_trained(given.checkpoint), given.push_to_hub
    trained.check_base()
    kind = given.to or ("lora" if trained.recipe.trainable.lora else "merged")
    if kind in ("lora", "comfyui") and not trained.recipe.trainable.lora:
        raise InputError(
            f"--to {kind}: {trained.output_dir} has trained the transformer's own weights, so there is no LoRA; "
            "export --to merged or pipeline"
        )
    named = kind if given.checkpoint.resolve() == trained.output_dir.resolve() else f"{kind}-{trained.step}"
    output = given.output or trained.output_dir / "export" / named
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output: {output} exists and is not empty; remove it, or name another folder")
    logger.info("%s: step %s of %s", kind, f"{trained.step:,}", trained.folder)
    present = open_model_repo(repo, private=not given.public, license=given.license) if repo else None
    card = model_card(
        trained, kind, dtype=given.dtype, repo=repo, folder=output, license=given.license, present=present
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{output.name}.staging-", dir=output.parent) as staging:
        folder = Path(staging, output.name)
        folder.mkdir()
        checked = EXPORTS[kind](trained, folder, dtype=getattr(torch, given.dtype))
        write_license(trained, folder)
        if (trained.output_dir / IMAGES).is_file():
            shutil.copyfile(trained.output_dir / IMAGES, folder / IMAGES)
        card.save(folder / CARD)
        folder.replace(output)
    logger.info("%s: written, read back and compared: %s", output, checked)
    if repo:
        logger.info("pushed: %s", push_model(output, repo, message=f"Add step {trained.step:,} as {kind}"))


def parse_arguments(argv: list[str]) -> Namespace:
    """The command line; raises InputError."""
    parser = Options()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--to", choices=("lora", "comfyui", "merged", "pipeline"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--push_to_hub")
    parser.add_argument("--public", action="store_true")
    parser.add_argument("--license")
    given = parser.parse_args(argv)
    if given.public and not given.push_to_hub:
        raise InputError("--public: nothing is pushed; add --push_to_hub org/name")
    return given


if __name__ == "__main__":
    run_script(main)
