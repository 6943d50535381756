"""Base and checkpoints of a run on held-out rows: edited, scored, and kept row by row, so that a launch resumes.

A row has two files in `<output_dir>/evaluation/<name>/`: its image, and then its scores with all that they depend on;
a third where it is judged (judging.py).
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from torch import nn
from tqdm import tqdm
from transformers import TrainingArguments

from hf_qie.config.launch import check_ranks
from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.data.online_latents import load_vae, placed
from hf_qie.errors import InputError
from hf_qie.hub.sampler import BASE
from hf_qie.hub.trained_run import EVALUATION, find_checkpoints, find_trained, run_record
from hf_qie.measures.edits import SCORES
from hf_qie.models.checkpoint import checkpoint_folder, saved_tensors
from hf_qie.models.lora_files import LORA_FILE
from hf_qie.runtime.files import move_durably, write_durably
from hf_qie.training.checkpoints import file_digest
from hf_qie.training.dcp_reader import MODEL_FOLDER, sharded_tensors
from hf_qie.training.evaluation import HeldOut, split_sets, spread
from hf_qie.training.held_out_edits import HeldOutEdits
from hf_qie.training.model import TRANSFORMER_FOLDER, base_of, build_model, load_weights, parameters
from hf_qie.training.objective import Objective
from hf_qie.training.offloading import stream_blocks
from hf_qie.training.precision import DTYPES, compute_in
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import training_arguments

logger = logging.getLogger("hf_qie.score")

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # accelerate's names for those of a run record


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights to score: those of a step of a run in `folder`, or the base."""

    name: str
    step: int = 0
    folder: Path | None = None


def scoring_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's `training` as TrainingArguments, with the launch's process group; nothing is sharded."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # of a launcher that is configured for training
    training = {key: value for key, value in recipe.training.items() if key not in ("fsdp", "fsdp_config")}
    arguments = training_arguments(recipe.model_copy(update={"training": training}), num_rows=0)
    check_ranks(os.environ)
    return arguments


def candidates(output_dir: Path, *, base: bool, steps: Sequence[int], every: bool) -> list[Candidate]:
    """The base and the steps that are asked for, by step; if none is, the base and what sampling.py would use.

    Rank 0 looks. Raises InputError, there, where there is no such checkpoint, or it is incomplete.
    """
    found = [_find(output_dir, base, steps, every) if PartialState().is_main_process else None]
    return broadcast_object_list(found)[0]


def _find(output_dir: Path, base: bool, steps: Sequence[int], every: bool) -> list[Candidate]:
    if every:
        found = find_checkpoints(output_dir)
    elif steps or base:
        found = [find_trained(output_dir / f"checkpoint-{step}") for step in steps]
    else:
        found = [find_trained(output_dir)]
        if (same := output_dir / f"checkpoint-{found[0].step}").is_dir():
            found = [find_trained(same)]  # in the dtype of training
    by_step = {one.step: one.folder for one in found}
    named = [Candidate(name=f"checkpoint-{step}", step=step, folder=by_step[step]) for step in sorted(by_step)]
    return [Candidate(name=BASE)] * (base or every or not steps) + named


class Scorer:
    """Edits held-out rows with candidates and scores them; the model is loaded when a row needs it."""

    edits_class = HeldOutEdits

    def __init__(self, recipe: Recipe, arguments: TrainingArguments):
        """Every rank makes one. Raises InputError where the embedding sets do not fit the recipe."""
        self.recipe, self.device, self.state = recipe, arguments.device, PartialState()
        output_dir = Path(arguments.output_dir)
        self.folder, self.record = output_dir / EVALUATION, run_record(output_dir)
        if self.state.is_main_process:
            _warn_of_trained_rows(recipe, output_dir)
        sets = open_sets(recipe)
        self.held_out = HeldOut(split_sets(sets, recipe.tasks)[1], recipe)
        self.numbers = spread(self.held_out, recipe.evaluation.rows)
        self.embeddings = {task: data._fingerprint for task, data in sets.items()}
        # as training computed, for its scores: whatever this launch would choose
        self.precision = PRECISIONS.get(self.record.get("arithmetic"), arguments.mixed_precision)
        self.arithmetic = next(name for name, precision in PRECISIONS.items() if precision == self.precision)
        vae = load_vae(recipe, self.device)
        self.edits = self.edits_class(
            self.held_out,
            recipe,
            objective=Objective(recipe, global_batch_size=1),
            vae=vae,
            on_device=lambda batch: placed(batch, self.device, vae, batch_size=recipe.extract.vae_batch_size),
        )
        self.loaded = BASE

    def run(self, chosen: Sequence[Candidate]) -> set[str]:
        """Score every row that is not scored yet, shared among the ranks; the candidates that had such rows."""
        jobs = broadcast_object_list([self._jobs(chosen) if self.state.is_main_process else None])[0]
        mine, by_name = jobs[self.state.process_index :: self.state.num_processes], {one.name: one for one in chosen}
        for name, number, made_with in tqdm(
            mine, "scoring", unit="edit", disable=None if self.state.is_main_process else True
        ):
            self._score(by_name[name], number, made_with)
        self.state.wait_for_everyone()
        return {name for name, *_ in jobs}

    def rows(self, candidate: Candidate, *, judged: bool | None = None) -> list[dict[str, Any]]:
        """What is kept of each row of a candidate that was run: task, row, scores and made_with.

        `judged`: with the scores of the judge; None: if the recipe has one.
        """
        rows = [_read(self.path(candidate, number)) for number in self.numbers]
        if self.recipe.evaluation.judge is not None if judged is None else judged:
            for number, row in zip(self.numbers, rows, strict=True):
                row["scores"] |= _read(self.path(candidate, number, judged=True))["scores"]
        return rows

    def release(self) -> None:
        """Give the memory of the transformer back."""
        self.__dict__.pop("_model", None)
        self.loaded = BASE
        clear_device_cache(garbage_collection=True)

    def path(self, candidate: Candidate, number: int, *, judged: bool = False) -> Path:
        """The file with the scores of a row, or with those of its judge; its image has the first's name, with .png."""
        return self.folder / candidate.name / f"{self.edits.name(number)}{'.judge' if judged else ''}.json"

    def _jobs(self, chosen: Sequence[Candidate]) -> list[tuple[str, int, dict[str, Any]]]:
        """(candidate, number, made_with) of the rows to score: those without files, or made with other values."""
        jobs = []
        for candidate in chosen:
            changed, weights = set(), digest(weight_files(candidate.folder)) if candidate.folder else BASE
            for number in self.numbers:
                path, made_with = self.path(candidate, number), {"weights": weights} | self._made_with(number)
                was = read_made_with(path)
                if was != made_with or not path.with_suffix(".png").is_file():
                    jobs.append((candidate.name, number, made_with))
                    changed |= {key for key in was if was[key] != made_with.get(key)}
            if changed:
                logger.info("%s: scored again, with another %s", candidate.name, ", ".join(sorted(changed)))
        return jobs

    def _score(self, candidate: Candidate, number: int, made_with: dict[str, Any]) -> None:
        if self.loaded != candidate.name:
            assert candidate.folder, "the base comes first"
            put_weights(self._model, candidate.folder)
            self.loaded = candidate.name
        image = self.edits.vae.decode(*self.edits.latents(self._model, number, self.recipe.evaluation))
        row = {"task": self.held_out.places[number][0], "row": self.held_out.rows[number]}
        row |= {"scores": self.edits.score(number, image), "made_with": made_with}
        path = self.path(candidate, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}.{uuid4().hex}")
        image.save(temporary, "png")
        move_durably(temporary, path.with_suffix(".png"))
        write_durably(path, json.dumps(row, indent=2, ensure_ascii=False, allow_nan=False))

    def _made_with(self, number: int) -> dict[str, Any]:
        """All that the image and the scores of a row depend on, beside the weights of a candidate."""
        settings, scale = self.recipe.evaluation, self.recipe.evaluation.true_cfg_scale
        return {
            "model": self._base,
            "arithmetic": self.arithmetic,
            "seed": self.recipe.seed,
            "num_inference_steps": settings.num_inference_steps,
            "true_cfg_scale": self.edits.objective.family.true_cfg_scale if scale is None else scale,
            "embeddings": self.embeddings[self.held_out.places[number][0]],
            "instruction": self.edits.instruction(number),
            "compared_with": self.edits.origin(number),
            "scores": list(SCORES),
        }

    @cached_property
    def _base(self) -> str:
        folder = checkpoint_folder(self.recipe.model, [TRANSFORMER_FOLDER], revision=self.recipe.revision)
        return digest(files_in(folder / TRANSFORMER_FOLDER))

    @cached_property
    def _model(self) -> nn.Module:
        """The base as it computes in training, with adapters that do nothing yet if these trained."""
        recipe, where = self.recipe, {"revision": self.recipe.revision}
        if lora := recipe.trainable.lora:
            fresh = {"lora": lora.model_copy(update={"init_from": None})}
            recipe = recipe.model_copy(update={"trainable": recipe.trainable.model_copy(update=fresh)})
        if not lora and self.precision in DTYPES:  # half of the memory: training rounds its float32 weights for use
            model = self.edits.objective.family.load_transformer(recipe.model, dtype=DTYPES[self.precision], **where)
        else:
            model = build_model(recipe, mixed_precision=self.precision, device=self.device)
        compute_in(model, self.precision)
        if recipe.memory.stream_blocks:
            stream_blocks(model, base_of(model), recipe.memory.stream_blocks, self.device)
        return model.to(self.device).requires_grad_(False).eval()


@torch.no_grad()
def put_weights(model: nn.Module, folder: Path) -> None:
    """Give the model the weights in a folder of its run; raises InputError where they are not all of them."""
    if (folder / LORA_FILE).is_file():
        load_weights(model, folder)
        return
    whole, own = folder / TRANSFORMER_FOLDER, parameters(model)
    tensors = saved_tensors(whole) if whole.is_dir() else sharded_tensors(folder)
    if unmatched := tensors.keys() ^ own.keys():
        raise InputError(f"{folder}: {min(unmatched)} is in it or in the model alone; take another checkpoint")
    for name, parameter in own.items():
        parameter.copy_(tensors[name]())


def _warn_of_trained_rows(recipe: Recipe, output_dir: Path) -> None:
    ran = load_recipe(path).tasks if (path := output_dir / "recipe.yaml").is_file() else {}
    for name, task in recipe.tasks.items():
        if name in ran and ran[name].weight and task.eval_rows > ran[name].eval_rows:
            logger.warning(
                "tasks.%s.eval_rows: %d, but the run held out %d: rows that it trained on are among those to score",
                *(name, task.eval_rows, ran[name].eval_rows),
            )


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights in a folder of a run: of a LoRA, a transformer, or a sharded checkpoint."""
    if (path := folder / LORA_FILE).is_file():
        return [path]
    return files_in(whole if (whole := folder / TRANSFORMER_FOLDER).is_dir() else folder / MODEL_FOLDER)


def files_in(folder: Path) -> list[Path]:
    """In the order of their names."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def digest(files: Sequence[Path]) -> str:
    """Of all of small files, and of samples of large ones."""
    return hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_made_with(path: Path) -> dict[str, Any]:
    """What a row was scored with; {} where it is not, or the file is damaged."""
    try:
        return dict(_read(path)["made_with"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}
