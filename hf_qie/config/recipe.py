"""The recipe: one YAML file and dotted overrides become a frozen `Recipe`, checked before torch is imported.

A new key is a line in its section: type or rule, default, description. The JSON schema is made from the same lines.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.json_schema import SkipJsonSchema

from hf_qie.config.data import Data
from hf_qie.config.ema import Ema, check_ema
from hf_qie.config.evaluation import Evaluation, Sampling, with_evaluation
from hf_qie.config.memory import Memory, check_memory
from hf_qie.config.training_args import check_training, training_arguments, training_schema
from hf_qie.errors import InputError
from hf_qie.runtime.rules import (
    Below1,
    Count,
    Listed,
    Name,
    Names,
    One,
    PathName,
    Positive,
    Section,
    Seed,
    Share,
    Side,
    Table,
    Weight,
    Whole,
    join,
    rule,
    show,
    unknown,
    validate,
)
from hf_qie.runtime.yaml_io import read_yaml, write_yaml

ModeScale = Annotated[float, Field(ge=-1, le=1.75), rule("a number from -1 to 1.75")]  # where it is one to one
Shard = Annotated[tuple[int, ...], Listed, rule("[i, n] with 0 <= i < n", lambda s: len(s) == 2 and 0 <= s[0] < s[1])]
ModuleNames = Annotated[tuple[Name, ...], Listed, rule("a list of at least one name", len)]
HubName = Annotated[str, rule("a Hub id like org/name", lambda name: name.count("/") == 1)]
_name_of_task = re.compile(r"[A-Za-z_][A-Za-z0-9_]*").fullmatch
TaskName = Annotated[str, rule("a name of letters, digits and _ that does not start with a digit", _name_of_task)]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class Task(Data):
    """One dataset and its part in the mix."""

    weight: Weight = Field(1.0, description="relative; 0: extracted and evaluated, not trained")
    t2i: bool = Field(False, description="ignore sources: text-to-image")
    eval_rows: Whole = Field(0, description="hold out the last n rows of the set for evaluation")
    embeddings: PathName | None = Field(None, description="a ready set: folder, org/name[:config][@revision]")


class Extract(Section):
    """Prompt embeddings and latents, computed once by extract.py."""

    output_dir: PathName = "outputs/embeddings"
    batch_size: Count = Field(4, description="rows per forward pass of the prompt encoder")
    image_sample_size: Side = Field(512, description="px; the target covers the area of this square, sides are x 32")
    source_sample_size: Side | None = Field(None, description="px, the same for sources; null: as the pipeline has it")
    inverse: bool = Field(True, description="also target -> source, where a row has one source and an inverse caption")
    drop_caption: str = Field(" ", description="what caption dropout trains on: the official negative prompt")
    latents: bool = Field(True, description="store VAE latents; false: training encodes images itself")
    vae_batch_size: Count = Field(1, description="images per forward pass of the VAE")
    dtype: Dtype = Field("auto", description="of the computation; auto: bfloat16 where the device supports it")
    chunk_rows: Count = Field(256, description="rows that a crash can cost at most; ranks share out chunks")
    num_workers: Count = Field(4, description="threads that read and prepare images")
    on_bad_row: Literal["skip", "fail"] = Field("skip", description="skip: counted and listed in bad_rows.jsonl")
    max_bad_share: Share = Field(0.01, description="exit 3 when more than this share and more than one row are bad")
    overwrite: bool = Field(False, description="start again where the recipe or the data changed")
    shard: Shard | None = Field(None, description="[i, n]: this launch does chunks i, i+n, ...")
    allow_private_urls: bool = Field(False, description="also read images from addresses of the local network")
    push_to_hub: HubName | None = Field(None, description="org/name; one config per task, the first is the default")
    private: bool = Field(True, description="of the pushed repository")
    license: Name | None = Field(None, description="on the pushed card")


class Mix(Section):
    """How draws are shared out."""

    source_count_weights: Table[Whole, Weight] | None = Field(None, description="null: the tasks' weights decide")
    same_shape: Count | None = Field(None, description="rows of a bucket; null: those of a micro-batch")
    draws_per_row: Count = Field(1, description="noises of a row in one pass; for models whose prefix sees no noise")
    caption_weights: Table[Name, Weight] | None = Field(None, description="null: equal over the captions a row has")
    caption_dropout: Share = Field(0.05, description="the chance that a draw trains on extract.drop_caption")
    inverse_share: Share = Field(0.0, description="the chance that a draw of a row with an inverse is its inverse")


class Loss(Section):
    """Which sigmas are drawn and how they weigh."""

    timestep_sampling: Literal["uniform", "stratified", "logit_normal", "mode"] = "uniform"
    logit_mean: float = Field(0.0, description="of logit_normal")
    logit_std: Positive = Field(1.0, description="of logit_normal")
    mode_scale: ModeScale = Field(1.29, description="of mode")
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    shift: Literal["auto", "none"] | float = Field("auto", description="auto: mu at the target's tokens; or mu itself")
    edit_weight: Weight = Field(0.0, description="k: to one even part, k parts of the loss follow what is edited")


class Lora(Section):
    """Low-rank adapters in place of full fine-tuning."""

    rank: Count = 32
    alpha: Positive = Field(32.0, description="the adapter's output is scaled by alpha / rank")
    dropout: Below1 = Field(0.0, description="of what adapters are given; masks change with batch size and ranks")
    target_modules: Literal["attention", "attention+mlp", "all-linear"] | ModuleNames = "attention"
    init_from: PathName | None = Field(None, description="adapters to start from: a folder or a Hub id")


class Trainable(Section):
    """What is trained."""

    lora: Lora | None = Field(None, description="null: full fine-tuning of `modules`")
    modules: Names = Field((".",), description="parts of dotted names that train; . is all")
    low_lr_modules: Annotated[tuple[Name, ...], Listed, One] = Field((), description="train at half the rate")


def _named(tasks: Mapping[str, Task]) -> Mapping[str, Task]:
    """Give each task its name."""
    return MappingProxyType({name: task.model_copy(update={"name": name}) for name, task in tasks.items()})


class Recipe(Section):
    """All settings of extract.py and train.py."""

    path: SkipJsonSchema[Path] = Field(Path(), exclude=True)  # of the file it was read from
    model: PathName = Field("Qwen/Qwen-Image-Edit-2509", description="Hub id, or a folder in diffusers layout")
    revision: Name | None = None
    seed: Seed = Field(0, description="the only seed")
    tasks: Annotated[Mapping[TaskName, Task], AfterValidator(_named)]
    extract: Extract = Field(default_factory=Extract)
    mix: Mix = Field(default_factory=Mix)
    loss: Loss = Field(default_factory=Loss)
    trainable: Trainable = Field(default_factory=Trainable)
    ema: Ema | None = Field(None, description="null: the last step's weights are evaluated and saved")
    memory: Memory = Field(default_factory=Memory)
    sampling: Sampling = Field(default_factory=Sampling)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    training: Table[Any, Any] = Field(default_factory=dict, description="transformers.TrainingArguments")

    @property
    def makes_images(self) -> bool:
        """Whether training makes images of held-out rows, for which it has a VAE."""
        return bool(self.sampling.every or self.evaluation.every)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and put `a.b.c=value` overrides over it.

    Paths in it may hold `~` and environment variables; relative ones start at the working directory.

    Raises:
        InputError: the file, an override, or a value in either is wrong; the message has its address.
    """
    path = Path(os.path.expanduser(path))
    try:
        raw = read_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a recipe, then overrides a.b.c=value") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: got {show(raw)}, expected a mapping with at least `tasks`")
    for text in overrides:
        override(raw, text)
    try:
        recipe = validate(Recipe, raw)
        training = MappingProxyType(with_evaluation(check_training(recipe.training), recipe.evaluation.every))
        recipe = recipe.model_copy(update={"path": path, "training": training})
        _check_together(recipe)
    except InputError as error:
        by = [text for text in overrides if re.match(re.escape(text.partition("=")[0]) + r"(\W|$)", error.args[0])]
        raise InputError(f"{path}: {f'override {by[-1]!r}: ' if by else ''}{error}") from None
    return recipe


def override(settings: dict[str, Any], text: str) -> None:
    """Put `a.b.c=value` into plain settings; sections that are missing on the way are added."""
    where = f"override {text!r}"
    if not re.match(r"[^\s.=]+(\.[^\s.=]+)*=", text):
        raise InputError(f"{where}: expected a.b.c=value")
    dotted, _, value = text.partition("=")
    *parents, last = (int(part) if part.isdecimal() else part for part in dotted.split("."))
    for key in parents:
        section = {} if settings.get(key) is None else settings[key]
        if not isinstance(section, dict):
            raise InputError(f"{where}: {key} is {show(section)}, which has no keys")
        settings[key] = dict(section)  # a copy: through a YAML alias the same section may stand elsewhere too
        settings = settings[key]
    settings[last] = read_yaml(value, where)


def as_dict(value: Any) -> Any:
    """A recipe, or a part of one, as plain mappings, lists and scalars: what YAML and JSON hold, defaults filled in.

    A default list of captions is left out: once it is named, each of its columns must occur in the data.
    """
    if isinstance(value, Section):
        unnamed = {"captions", "inverse_captions"} - value.model_fields_set
        return {key: as_dict(getattr(value, key)) for key in value.key_names() if key not in unnamed}
    if isinstance(value, Mapping):
        return {key: as_dict(item) for key, item in value.items()}
    return [as_dict(item) for item in value] if isinstance(value, list | tuple) else value


def leaves(section: Section, at: str = "") -> Iterator[tuple[str, Any]]:
    """(address, value) of every key of a section that is not a section itself."""
    for key in section.key_names():
        value = getattr(section, key)
        if isinstance(value, Section):
            yield from leaves(value, join(at, key))
        else:
            yield join(at, key), value


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe to the file `path`; loading it gives an equal `Recipe`."""
    path.write_text(write_yaml(as_dict(recipe)), encoding="utf-8")


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, by which editors complete and check it."""
    schema = Recipe.model_json_schema()
    schema["properties"]["training"] |= training_schema()
    return schema


def _check_draws_per_row(recipe: Recipe) -> None:
    """Raise InputError where a micro-batch would cut the draws of a row."""
    count, key = recipe.mix.draws_per_row, "per_device_train_batch_size"
    size = recipe.training.get(key, training_arguments()[key][1])
    if size % count:
        message = f"got {count}, but training.{key}, which counts draws, is {size}; make it a multiple"
        raise InputError("mix.draws_per_row", message)


def _check_together(recipe: Recipe) -> None:
    """Check what no single value shows."""
    _check_draws_per_row(recipe)
    for name, task in recipe.tasks.items():
        if not task.data and task.embeddings is None:
            raise InputError(f"tasks.{name}.data", "missing, and no ready set in `embeddings` takes its place")
        inverse, forward = map(len, (task.columns.inverse_captions, task.columns.captions))
        if inverse > forward:
            message = f"got {inverse} for {forward} captions; the i-th is the inverse of the i-th"
            raise InputError(f"tasks.{name}.columns.inverse_captions", message)
    check_ema(recipe.ema, training=recipe.training)
    check_memory(recipe.memory, lora=recipe.trainable.lora is not None, training=recipe.training)
    if not any(task.weight for task in recipe.tasks.values()):
        raise InputError("tasks", "expected at least one task with a weight above 0")
    if not any(task.eval_rows for task in recipe.tasks.values()):
        hint = "no task holds out rows to evaluate on; set tasks.<name>.eval_rows"
        for section in ("sampling", "evaluation"):
            if getattr(recipe, section).every:
                raise InputError(f"{section}.every", hint)
        if recipe.training.get("eval_strategy", "no") != "no":
            raise InputError("training.eval_strategy", hint)
    for key in ("source_count_weights", "caption_weights"):
        weights = getattr(recipe.mix, key)
        if weights is not None and not any(weights.values()):
            raise InputError(f"mix.{key}", "expected at least one weight above 0, or null")
    if any(task.embeddings for task in recipe.tasks.values()):
        return  # the captions of a ready set are known once it is open
    captions = {caption: None for task in recipe.tasks.values() for caption in task.columns.captions}
    for caption in recipe.mix.caption_weights or ():
        if caption not in captions and re.sub(r"_[0-9]+$", "", caption) not in captions:  # a text of a list
            raise InputError(f"mix.caption_weights.{caption}", unknown(caption, captions))
