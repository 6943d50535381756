"""What a run has trained, found in its output folder: which weights, of which step, on which base.

Letters: r rank, I width of a layer's input, O of its output.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.errors import InputError
from hf_qie.models.base import Family, read_family
from hf_qie.models.checkpoint import Tensors, checkpoint_folder, read_config, saved_tensors
from hf_qie.models.lora_files import LORA_FILE, PREFIX, read_lora
from hf_qie.training.checkpoints import RECORD, STATE, WEIGHTS_ALONE, last_checkpoint, misfit, step_of
from hf_qie.training.dcp_reader import sharded_tensors
from hf_qie.training.model import TRANSFORMER_FOLDER

logger = logging.getLogger(__name__)

EVALUATION = "evaluation"  # in the output folder what score.py writes
SUMMARY = "summary.json"  # in there, the figures
REGRESSION = "regression"  # in the folder of the evaluation, a folder for each data
WANTED = "expected training.output_dir of a run, or a checkpoint-N in it"


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """A LoRA: W + alpha / r * up @ down in place of W."""

    layers: Mapping[str, tuple[Tensor, Tensor]]  # by the layer's name: down [r, I] and up [O, r]
    settings: Mapping[str, Any]  # r, lora_alpha, lora_dropout and target_modules, as peft names them

    def delta(self, layer: str) -> Tensor:
        """What is added to the layer's weight, `[O, I]` in float32."""
        down, up = (tensor.float() for tensor in self.layers[layer])
        return up @ down * (self.settings["lora_alpha"] / len(down))


@dataclass(frozen=True)
class Trained:
    """The weights of one step of a run, and what was recorded beside them."""

    output_dir: Path
    folder: Path  # with the weights: a checkpoint, or `output_dir` itself
    recipe: Recipe
    state: Mapping[str, Any]  # Trainer's own: steps, losses
    record: Mapping[str, Any]  # of hf_qie/training/setup.py; {} if the run left none

    @property
    def name(self) -> str:
        """The name of the output folder."""
        return self.output_dir.resolve().name

    @property
    def step(self) -> int:
        """How many steps the weights were trained."""
        return step_of(Path(self.best)) if self.best else self.state["global_step"]

    @property
    def best(self) -> str | None:
        """The checkpoint whose weights these are, if the run ended by loading its best one."""
        loads_best = self.recipe.training.get("load_best_model_at_end", False)
        return self.state.get("best_model_checkpoint") if loads_best and self.folder == self.output_dir else None

    def check_base(self) -> None:
        """Raise InputError if the run started from a folder that is not found any more: the Hub may have its name."""
        model, record = self.recipe.model, self.record
        if "started_in" in record and not record["commit"] and not Path(model).is_dir():
            raise InputError(
                f"{self.output_dir / 'recipe.yaml'}: model: {model!r} is not found from {record['started_in']}, where "
                f"training was started, nor from {Path.cwd()}; put it there, or write its present path into that file"
            )

    @cached_property
    def adapters(self) -> Adapters | None:
        """The LoRA, of a run that trained one."""
        return read_adapters(self.folder / LORA_FILE) if self.recipe.trainable.lora else None

    @cached_property
    def family(self) -> Family:
        """Of the base."""
        return read_family(self.recipe.model, revision=self.recipe.revision)

    @cached_property
    def base_config(self) -> dict[str, Any]:
        """The transformer's config."""
        return read_config(self.recipe.model, f"{TRANSFORMER_FOLDER}/config.json", revision=self.recipe.revision)

    def summaries(self) -> list[dict[str, Any]]:
        """What score.py has left of the run: of held-out rows, and then of other data, with its name in `data`."""
        folder = self.output_dir / EVALUATION
        paths = [folder / SUMMARY, *sorted(folder.glob(f"{REGRESSION}/*/{SUMMARY}"))]
        return [_read_json(path) for path in paths if path.is_file()]

    def tensors(self) -> Tensors:
        """The transformer as trained, or for a LoRA its base; raises InputError for a base that is quantised."""
        if not self.recipe.trainable.lora:
            saved = self.folder / TRANSFORMER_FOLDER
            return saved_tensors(saved) if saved.is_dir() else sharded_tensors(self.folder)
        if quantised := self.base_config.get("quantization_config"):
            raise InputError(
                f"--to: the base {self.recipe.model!r} is quantised ({quantised.get('quant_method')}), so nothing can "
                "be merged into its weights; export --to lora, and load it on that base or on the one it was made from"
            )
        base = checkpoint_folder(self.recipe.model, [TRANSFORMER_FOLDER], revision=self.recipe.revision)
        return saved_tensors(base / TRANSFORMER_FOLDER)


def find_trained(path: Path) -> Trained:
    """The last complete weights of the output folder `path`, or those of a `checkpoint-N` in one.

    Raises InputError if there are none, or the checkpoint is incomplete.
    """
    PartialState()  # the log of checkpoints needs it
    if not path.is_dir():
        raise InputError(f"{path}: {'is a file' if path.exists() else 'not found'}; {WANTED}")
    one = (path / "complete.json").exists() or path.resolve().name.startswith("checkpoint-")
    output_dir = path.resolve().parent if one else path
    if not (output_dir / "recipe.yaml").is_file():
        raise InputError(f"{output_dir}: has no recipe.yaml, which train.py leaves there; {WANTED}")
    folder = path if one else _newest(output_dir)
    if one and (reason := misfit(folder)) not in (None, WEIGHTS_ALONE):
        raise InputError(
            f"{folder}: the checkpoint is incomplete, {reason}; export {output_dir}, or another one of it"
        )
    recipe, update = load_recipe(output_dir / "recipe.yaml"), {}
    record = run_record(output_dir)
    base = Path(record.get("started_in", ""), recipe.model)
    if base.is_dir() and base.resolve() != Path(recipe.model).resolve():  # else it is found from here as it stands
        update["model"] = str(base)
    if record.get("commit"):  # the Hub's `main` may have moved on since, and another base fits no adapter
        update["revision"] = record["commit"]
    state = _read_json(folder / STATE)
    return Trained(output_dir, folder, recipe.model_copy(update=update), state, record)


def find_checkpoints(output_dir: Path) -> list[Trained]:
    """Every step of a run whose weights are complete: those that it ended with, and its checkpoints.

    Raises InputError where there is none; a warning names checkpoints that are incomplete.
    """
    found = [find_trained(output_dir)]
    for folder in output_dir.glob("checkpoint-*[0-9]"):
        if (reason := misfit(folder)) in (None, WEIGHTS_ALONE):
            found.append(find_trained(folder))
        else:
            logger.warning("%s is skipped: %s", folder, reason)
    return found


def run_record(output_dir: Path) -> dict[str, Any]:
    """What train.py recorded of a run when it began; {} if it left nothing."""
    return _read_json(output_dir / RECORD) if (output_dir / RECORD).exists() else {}


def find_weights(checkpoint: Path) -> Path:
    """The LoRA file, or the folder of a transformer, that `--checkpoint` stands for; raises InputError."""
    if not checkpoint.exists():
        raise InputError(
            f"--checkpoint: {checkpoint} not found; train first, or name `base`, the model before training"
        )
    if checkpoint.is_file() and checkpoint.suffix == ".safetensors":
        return checkpoint
    if (checkpoint / "recipe.yaml").is_file():  # a run, which may have ended, been interrupted, or resumed since
        checkpoint = find_trained(checkpoint).folder
    if (checkpoint / LORA_FILE).is_file():
        return checkpoint / LORA_FILE
    for folder in (checkpoint / TRANSFORMER_FOLDER, checkpoint):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(
        f"--checkpoint: {checkpoint} has no {LORA_FILE} and no folder {TRANSFORMER_FOLDER}/; a sharded checkpoint is "
        f"converted by python hf_qie/export.py {checkpoint}"
    )


def _newest(output_dir: Path) -> Path:
    """`output_dir` itself if its run has ended and was not resumed since, else its last complete checkpoint."""
    last = last_checkpoint(output_dir)
    ended = _read_json(output_dir / STATE)["global_step"] if (output_dir / STATE).is_file() else -1
    if ended >= (step_of(last) if last else 0):
        return output_dir
    if last is None:
        raise InputError(
            f"{output_dir}: has no complete checkpoint, and its run has not ended; wait, or name a checkpoint-N that "
            "holds weights alone (save_only_model)"
        )
    return last


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object")
        return value
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); export another checkpoint") from error


def read_adapters(path: Path) -> Adapters:
    """A LoRA file that train.py wrote; raises InputError for any other."""
    tensors, metadata = read_lora(path, where=str(path), convert=dict)
    layers = {}
    for name in (key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")):
        down, up = (tensors.get(f"{name}.lora_{half}.weight") for half in "AB")
        fits = up is not None and down.ndim == up.ndim == 2 and len(down) == up.shape[1]
        if not fits or not (down.is_floating_point() and up.is_floating_point()):
            raise InputError(f"{path}: {name}: lora_A and lora_B do not fit each other; export another checkpoint")
        layers[name.removeprefix(PREFIX)] = down, up
    settings = {key.removeprefix(PREFIX): value for key, value in (metadata or {}).items()}
    if "lora_alpha" not in settings:
        raise InputError(f"{path}: has no rank and alpha, which train.py writes; train again")
    return Adapters(layers=layers, settings=settings)
