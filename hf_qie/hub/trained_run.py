"""What a run has trained, found in its output folder: which weights, of which step, on which base.

Letters: r rank, I width of a layer's input, O of its output.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.errors import InputError
from hf_qie.models.checkpoint import read_config
from hf_qie.runtime.hub_errors import hub_errors
from hf_qie.training.checkpoints import WEIGHTS_ALONE, last_checkpoint, misfit, step_of
from hf_qie.training.dcp_reader import MODEL_FOLDER, sharded_tensors
from hf_qie.training.model import LORA_FILE, TRANSFORMER_FOLDER
from hf_qie.training.run_record import RECORD, STATE

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # diffusers' name for it
PLAIN = (".json", ".txt", ".jinja", ".model", ".safetensors")  # what of a base is fetched and copied: runs no code
Tensors = Mapping[str, Callable[[], Tensor]]  # by name; read when called, so that a model never lies in memory whole


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The weights of one step of a run, and what was written down beside them."""

    output_dir: Path
    folder: Path  # with the weights: a checkpoint, or `output_dir` itself
    recipe: Recipe
    state: Mapping[str, Any]  # Trainer's own: steps, losses
    record: Mapping[str, Any]  # of hf_qie/training/run_record.py; {} where a run left none

    @property
    def name(self) -> str:
        """What people would call it."""
        return self.output_dir.resolve().name

    @property
    def step(self) -> int:
        """How many steps the weights have seen."""
        if best := self.best:
            return step_of(Path(best))
        return self.state["global_step"]

    @property
    def best(self) -> str | None:
        """The checkpoint that was taken for the best in the end, if these are the weights of such a one."""
        wanted = self.recipe.training.get("load_best_model_at_end", False)
        return self.state.get("best_model_checkpoint") if wanted and self.folder == self.output_dir else None

    def check_base(self) -> None:
        """Raise InputError where the run started from a folder that is no longer there."""
        model, record = self.recipe.model, self.record
        if "started_in" in record and not record["commit"] and not Path(model).is_dir():
            raise InputError(
                f"{self.output_dir / 'recipe.yaml'}: model: {model!r} is not found from {record['started_in']}, where "
                f"training was started, nor from {Path.cwd()}; put it there, or write its present path into that file"
            )

    @cached_property
    def adapters(self) -> "Adapters | None":
        """The LoRA, of a run that trained one."""
        return read_adapters(self.folder / LORA_FILE) if self.recipe.trainable.lora else None

    @cached_property
    def base_config(self) -> dict[str, Any]:
        """The transformer's config, without where it once lay."""
        config = read_config(self.recipe.model, f"{TRANSFORMER_FOLDER}/config.json", revision=self.recipe.revision)
        return {key: value for key, value in config.items() if key != "_name_or_path"}

    def base(self) -> Tensors:
        """The transformer that the run started from; raises InputError where it is not found, or is quantised."""
        if quantised := self.base_config.get("quantization_config"):
            raise InputError(
                f"--to: the base {self.recipe.model!r} is quantised ({quantised.get('quant_method')}), so nothing can "
                "be merged into its weights; export --to lora, and load it on that base or on the one it was made from"
            )
        return saved_tensors(base_folder(self.recipe, [TRANSFORMER_FOLDER]) / TRANSFORMER_FOLDER)

    def full(self) -> Tensors:
        """The transformer as trained, of a run that trained its own weights."""
        whole = self.folder / TRANSFORMER_FOLDER
        return saved_tensors(whole) if whole.is_dir() else sharded_tensors(self.folder)


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """A LoRA: W + alpha / r * up @ down in place of W."""

    layers: Mapping[str, tuple[Tensor, Tensor]]  # by the layer's name: down [r, I] and up [O, r]
    settings: Mapping[str, Any]  # r, lora_alpha, lora_dropout and target_modules, as peft names them

    @property
    def alpha(self) -> float:
        """Of all layers."""
        return float(self.settings["lora_alpha"])

    def delta(self, layer: str) -> Tensor:
        """What is added to the layer's weight, `[O, I]` in float32."""
        down, up = (tensor.float() for tensor in self.layers[layer])
        return up @ down * (self.alpha / len(down))

    def to(self, dtype: torch.dtype) -> "Adapters":
        """The same, rounded to `dtype`."""
        return Adapters(
            layers={name: (down.to(dtype), up.to(dtype)) for name, (down, up) in self.layers.items()},
            settings=self.settings,
        )


def find_trained(path: Path) -> Trained:
    """What `path` holds: of an output folder the last weights that are whole, or those of a `checkpoint-N` in one.

    Raises InputError where there are none, or the checkpoint is not whole.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; wanted training.output_dir of a run, or a checkpoint-N in it")
    one = (path / "complete.json").exists() or path.resolve().name.startswith("checkpoint-")
    output_dir = path if not one else path.parent if path.name == path.resolve().name else path.resolve().parent
    if not (output_dir / "recipe.yaml").is_file():
        raise InputError(
            f"{output_dir}: has no recipe.yaml, which train.py leaves there; wanted training.output_dir of a run, "
            "or a checkpoint-N in it"
        )
    folder = path if one else newest(output_dir)
    if one and (reason := misfit(folder)) not in (None, WEIGHTS_ALONE):
        raise InputError(f"{folder}: the checkpoint is not whole, {reason}; export {output_dir}, or another one of it")
    recipe = load_recipe(output_dir / "recipe.yaml")
    record = read_json(output_dir / RECORD) if (output_dir / RECORD).exists() else {}
    base = Path(record.get("started_in", ""), recipe.model)
    if base.is_dir() and base.resolve() != Path(recipe.model).resolve():  # else it is found from here as it stands
        recipe = recipe.model_copy(update={"model": str(base)})
    if record.get("commit"):  # the Hub's `main` may have moved on since, and another base fits no adapter
        recipe = recipe.model_copy(update={"revision": record["commit"]})
    wanted = [LORA_FILE] if recipe.trainable.lora else [TRANSFORMER_FOLDER, MODEL_FOLDER]
    if not any((folder / name).exists() for name in wanted):
        raise InputError(f"{folder}: holds no weights; wanted {' or '.join(wanted)}, as the recipe beside it trains")
    return Trained(
        output_dir=output_dir,
        folder=folder,
        recipe=recipe,
        state=read_state(folder),
        record=record,
    )


def find_weights(checkpoint: Path) -> Path:
    """A LoRA file, or the folder of a whole transformer, by what `--checkpoint` may be; raises InputError."""
    PartialState()  # without it, what finds checkpoints cannot log
    if not checkpoint.exists():
        raise InputError(
            f"--checkpoint: there is no {checkpoint}; train first, name what was trained, or `base` for the model "
            "before training"
        )
    if checkpoint.is_file() and checkpoint.suffix == ".safetensors":
        return checkpoint
    if (checkpoint / "recipe.yaml").is_file():  # a run, which may have ended, been stopped, or gone on since
        checkpoint = find_trained(checkpoint).folder
    if (checkpoint / LORA_FILE).is_file():
        return checkpoint / LORA_FILE
    for folder in (checkpoint / TRANSFORMER_FOLDER, checkpoint):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(
        f"--checkpoint: {checkpoint} has no {LORA_FILE} and no folder {TRANSFORMER_FOLDER}/; what is sharded becomes "
        f"one by python hf_qie/export.py {checkpoint}"
    )


def newest(output_dir: Path) -> Path:
    """`output_dir` itself where its run has ended, and has not gone on since; else its last whole checkpoint."""
    last = last_checkpoint(output_dir)
    if (output_dir / STATE).is_file():
        ended = read_state(output_dir)["global_step"]
        if last is None or step_of(last) <= ended:
            return output_dir
    if last is None:
        raise InputError(
            f"{output_dir}: has no whole checkpoint yet, and its run has not ended; wait for one, or name a "
            "checkpoint-N that holds weights alone (save_only_model)"
        )
    return last


def read_state(folder: Path) -> dict[str, Any]:
    """What Trainer noted of a step; raises InputError where that cannot be."""
    state = read_json(folder / STATE)
    if not isinstance(state.get("global_step"), int) or not isinstance(state.get("log_history"), list):
        raise InputError(f"{folder / STATE}: has no step and log, as train.py writes them; start it again")
    return state


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of names and values; raises InputError where it is none."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); train.py writes it, start it again") from error
    if not isinstance(read, dict):
        raise InputError(f"{path}: holds no names and values; train.py writes it, start it again")
    return read


def base_folder(recipe: Recipe, parts: list[str]) -> Path:
    """A folder with these parts of the checkpoint `recipe.model`, from here or from the Hub (cached)."""
    if not Path(recipe.model).is_dir():
        patterns = [f"{part}/*{kind}" for part in parts for kind in PLAIN]
        with hub_errors(f"model: {recipe.model!r} is not a folder here"):
            return Path(snapshot_download(recipe.model, revision=recipe.revision, allow_patterns=patterns))
    for part in parts:
        if not Path(recipe.model, part).is_dir():
            raise InputError(f"model: {recipe.model} has no folder {part}; it has to be in diffusers layout")
    return Path(recipe.model)


def saved_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """The tensors of a model that diffusers saved in `folder`; raises InputError where files are missing."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    names = [WEIGHTS_FILE]
    if index.exists():
        mapped = read_json(index).get("weight_map")
        names = sorted(set(mapped.values())) if isinstance(mapped, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise InputError(f"{index}: names no files of its own folder; fetch or write it again")
    tensors: dict[str, Callable[[], Tensor]] = {}
    for name in names:
        try:
            file = safe_open(folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder / name}: cannot be read ({error}); fetch or write it again") from error
        tensors |= {key: partial(file.get_tensor, key) for key in file.keys()}  # noqa: SIM118, it is no dict
    return tensors


def read_adapters(path: Path) -> Adapters:
    """A LoRA file as train.py leaves it; raises InputError where it is none."""
    try:
        tensors, metadata = QwenImageLoraLoaderMixin.lora_state_dict(
            str(path), use_safetensors=True, return_lora_metadata=True
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path}: does not load as a LoRA ({error})") from error
    prefix, layers = f"{TRANSFORMER_FOLDER}.", {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            if f"{layer}.lora_B.weight" not in tensors:
                raise InputError(f"{path}: {layer} has half an adapter; take another checkpoint")
            down, up = tensors[key], tensors[f"{layer}.lora_B.weight"]
            fits = down.ndim == up.ndim == 2 and len(down) == up.shape[1] and down.is_floating_point()
            if not fits or not up.is_floating_point():
                raise InputError(f"{path}: {layer}: {describe(down)} and {describe(up)} are no adapter")
            layers[layer.removeprefix(prefix)] = down, up
    settings = {key.removeprefix(prefix): value for key, value in (metadata or {}).items()}
    if not layers or not isinstance(settings.get("lora_alpha"), int | float):
        raise InputError(f"{path}: is no LoRA as train.py leaves it, with its rank and alpha; train again")
    return Adapters(layers=layers, settings=settings)


def describe(tensor: Tensor) -> str:
    """Shape and type in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
