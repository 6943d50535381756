"""RUN 3: what a run has trained, as others load it.

    python hf_qie/export.py outputs/run [--to lora|comfyui|merged|pipeline] [--output FOLDER] [--dtype float32]
    python hf_qie/export.py outputs/run --push_to_hub org/name [--public] [--license apache-2.0]

The first argument is training.output_dir, of which the last whole weights are taken, or a checkpoint-N in it; the run
may have trained adapters or the transformer itself, sharded or not, and may have been interrupted.

    lora      pytorch_lora_weights.safetensors for diffusers' load_lora_weights; what a LoRA becomes unless told
    comfyui   one file for ComfyUI's LoRA loader
    merged    a transformer for QwenImageTransformer2DModel.from_pretrained; what full fine-tuning becomes unless told
    pipeline  a whole checkpoint for DiffusionPipeline.from_pretrained

It is written to FOLDER, by default <output_dir>/export/<kind>, or <kind>-N of a checkpoint-N, in bfloat16, with a
model card; then it is read back and compared.
--push_to_hub puts the folder into a model repository, private unless --public.
"""

import logging
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hf_qie.errors import InputError
from hf_qie.runtime.cli import Options, run_script, to_path

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

logger = logging.getLogger("hf_qie.export")
KINDS = ("lora", "comfyui", "merged", "pipeline")
DTYPES = ("bfloat16", "float32")


def main(argv: list[str]) -> None:
    """Export what `argv[0]` has trained."""
    asked = arguments(argv)
    import torch
    from accelerate import PartialState

    from hf_qie.hub.export_formats import EXPORTS
    from hf_qie.hub.model_card import CARD, PICTURES, model_card
    from hf_qie.hub.trained_run import find_trained

    PartialState()  # without it, what finds checkpoints cannot log
    trained = find_trained(asked.checkpoint)
    trained.check_base()
    kind = asked.to or ("lora" if trained.recipe.trainable.lora else "merged")
    # of a checkpoint that was asked for by name, by that name
    named = kind if asked.checkpoint.resolve() == trained.output_dir.resolve() else f"{kind}-{trained.step}"
    output = asked.output or trained.output_dir / "export" / named
    logger.info("%s: step %s of %s", kind, f"{trained.step:,}", trained.folder)
    there = open_repo(asked) if asked.push_to_hub else None
    with room_for(output) as aside:
        checked = EXPORTS[kind](trained, aside, dtype=getattr(torch, asked.dtype))
        if pictures := (trained.output_dir / PICTURES).is_file():
            shutil.copyfile(trained.output_dir / PICTURES, aside / PICTURES)
        more = {"dtype": asked.dtype, "license": asked.license, "pictures": pictures, "there": there}
        model_card(trained, kind, repo=asked.push_to_hub, folder=output, **more).save(aside / CARD)
    logger.info("%s: written, read back and compared: %s", output, checked)
    if asked.push_to_hub:
        logger.info("pushed: %s", push(output, asked.push_to_hub, message=f"Add step {trained.step:,} as {kind}"))


def arguments(argv: list[str]) -> Namespace:
    """The command line."""
    parser = Options()
    parser.add_argument("checkpoint", type=to_path)
    parser.add_argument("--to", choices=KINDS)
    parser.add_argument("--output", type=to_path)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--push_to_hub")
    parser.add_argument("--public", action="store_true")
    parser.add_argument("--license")
    asked = parser.parse_args(argv)
    if asked.public and not asked.push_to_hub:
        raise InputError("--public: nothing is pushed; add --push_to_hub org/name")
    return asked


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


def open_repo(asked: Namespace) -> "ModelCard | None":
    """Make the model repository where there is none, before any work is done; returns the card that it has.

    Raises InputError where the Hub, the token, `--public` or `--license` stands against it.
    """
    from huggingface_hub import HfApi, ModelCard

    from hf_qie.hub.model_card import CARD
    from hf_qie.hub.publish import check_license, hub_errors

    api, repo, private = HfApi(), asked.push_to_hub, not asked.public
    with hub_errors(repo, at="--push_to_hub", remedy="try again; nothing was written yet"):
        if asked.license:
            check_license(asked.license, at="--license")
        api.create_repo(repo, private=private, exist_ok=True)
        found = api.model_info(repo)
        card = ModelCard.load(repo) if CARD in {file.rfilename for file in found.siblings} else None
    if found.private != private:
        is_now, remedy = ("public", "add --public") if private else ("private", "leave out --public")
        raise InputError(f"--push_to_hub: {repo} is there and {is_now}; {remedy}, or push elsewhere")
    return card


def push(folder: Path, repo: str, *, message: str) -> str:
    """Send the exported folder in one commit; returns the address."""
    from huggingface_hub import HfApi

    from hf_qie.hub.publish import hub_errors

    remedy = f"what was exported is in {folder}; send it with: hf upload {repo} {folder}"
    with hub_errors(repo, at="--push_to_hub", remedy=remedy):
        # shards that an earlier export left would be loaded in place of these
        stale = [f"{part}diffusion_pytorch_model*" for part in ("", "transformer/")]
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=stale)
    return f"{HfApi().endpoint}/{repo}"


if __name__ == "__main__":
    run_script(main)
