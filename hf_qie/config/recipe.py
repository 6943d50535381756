"""The recipe: one YAML file and dotted overrides become a frozen `Recipe`, checked before torch is imported.

Each section is a dataclass whose annotations are the rules, so a new key is one line here.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from hf_qie.config.training_args import check_training
from hf_qie.errors import InputError, Misfit
from hf_qie.runtime.settings import PathName, build, derived, override, read_yaml, show, unknown, write_yaml

# A rule of one value: the type, what is wanted in words, and the test.
Name = Annotated[str, "a string that is not blank", str.strip]
Seed = Annotated[int, "an integer from 0 to 4294967295", lambda n: 0 <= n < 2**32]
Whole = Annotated[int, "an integer of at least 0", lambda n: n >= 0]
Count = Annotated[int, "an integer of at least 1", lambda n: n >= 1]
Side = Annotated[int, "an integer of at least 64", lambda px: px >= 64]  # below, a long picture rounds to 0 pixels
Positive = Annotated[float, "a number above 0", lambda x: x > 0]
Weight = Annotated[float, "a number of at least 0", lambda x: x >= 0]
Share = Annotated[float, "a number from 0 to 1", lambda x: 0 <= x <= 1]
Dropout = Annotated[float, "a number from 0 to below 1", lambda x: 0 <= x < 1]
ModeScale = Annotated[float, "a number from -1 to 1.75", lambda x: -1 <= x <= 1.75]  # where it is one to one
Shard = Annotated[tuple[int, ...], "[i, n] with 0 <= i < n", lambda s: len(s) == 2 and 0 <= s[0] < s[1]]
Names = Annotated[tuple[Name, ...], "a list of at least one name", len]
HubName = Annotated[str, "a Hub id like org/name", lambda name: name.count("/") == 1]
TaskName = Annotated[
    str,
    "a name of letters, digits and _ that does not start with a digit",
    lambda name: re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name),
]
# An embedding set has these columns of its own, and text_embeds_drop.
SET_COLUMNS = {"row", "source_image", "target_image", "num_sources", "image_embeds", "target_latents", "target_grid"}
SET_COLUMNS |= {"source_latents", "source_grids", "drop"}
CaptionNames = Annotated[
    tuple[Name, ...],
    f"a list of different column names, none of them {', '.join(sorted(SET_COLUMNS))}",
    lambda names: len(set(names)) == len(names) and SET_COLUMNS.isdisjoint(names),
]
_named_captions = derived(lambda _, given: (*given.get("captions", ()), *given.get("inverse_captions", ())))


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a task's data mean what."""

    sources: Name | Names = "source_image"  # null, one path/URL/image, or an ordered list of them; or several columns
    target: Name = "target_image"
    captions: CaptionNames = ("instruction", "instruction_cn")
    inverse_captions: CaptionNames = ("inverse_instruction", "inverse_instruction_cn")  # i-th: inverse of the i-th
    required: tuple[str, ...] = field(default=(), metadata=_named_captions)  # those that the recipe names

    def __post_init__(self) -> None:
        if not set(self.inverse_captions) <= set(self.required):  # the default
            object.__setattr__(self, "inverse_captions", self.inverse_captions[: len(self.captions)])

    @cached_property
    def source_columns(self) -> tuple[str, ...]:
        """The columns that hold sources, in order."""
        return (self.sources,) if isinstance(self.sources, str) else self.sources

    @cached_property
    def source_label(self) -> str:
        """The sources of a row in a message."""
        return ", ".join(self.source_columns)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One dataset and its part in the mix."""

    name: str = field(metadata=derived(lambda at, _: at.rpartition(".")[2]))
    data: tuple[PathName, ...] = ()  # files, globs, a folder of save_to_disk, or a Hub id; none: a ready set is given
    split: Name = "train"
    image_root: PathName | None = None  # relative image paths start here; null: the folder of `data`
    weight: Weight = 1.0  # relative; 0: extracted and evaluated, not trained
    t2i: bool = False  # true: ignore sources, text-to-image
    eval_rows: Whole = 0  # hold out the last n rows of the set for evaluation
    columns: Columns = field(default_factory=Columns)
    embeddings: PathName | None = None  # a ready set: folder, `org/name` or `org/name:config`, with `@revision`


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Run 1: states and latents, once."""

    output_dir: PathName = "outputs/embeddings"
    batch_size: Count = 4  # rows a forward
    image_sample_size: Side = 512  # px; the target covers the area of this square, sides are multiples of 32
    source_sample_size: Side | None = None  # px, the same for sources; null: what the family's pipeline feeds its VAE
    inverse: bool = True  # also target -> source, where a row has exactly one source and an inverse caption
    drop_caption: str = " "  # what caption dropout trains on: the official negative prompt, with the same images
    latents: bool = True  # store VAE latents; false: training encodes images itself
    vae_batch_size: Count = 1  # images a VAE forward
    # of the computation, stored as float16; auto: bfloat16 where the device has units for it, else float32
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    chunk_rows: Count = 256  # rows that a crash can cost at most, and the unit that ranks share out
    num_workers: Count = 4  # threads that read and prepare images ahead of the model
    on_bad_row: Literal["skip", "fail"] = "skip"  # skip: counted and listed
    max_bad_share: Share = 0.01  # exit 3, rows kept, when more than this share and more than one row are bad
    overwrite: bool = False  # true: start again where the recipe or the data changed
    shard: Shard | None = None  # [i, n]: this launch does chunks i, i+n, ...
    allow_private_urls: bool = False  # true: also read images from addresses of the local network
    push_to_hub: HubName | None = None  # one config per task, the first is the default
    private: bool = True  # of the pushed repository
    license: Name | None = None  # on the pushed card


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How draws are shared out."""

    source_count_weights: Mapping[Whole, Weight] | None = None  # null: tasks' weights decide, counts follow the rows
    same_shape: Count | None = None  # rows of one shape drawn together; null: per_device_train_batch_size
    caption_weights: Mapping[Name, Weight] | None = None  # null: equal over the captions a row has
    caption_dropout: Share = 0.05  # the chance that a draw trains on `extract.drop_caption`
    inverse_share: Share = 0.0  # the chance that a draw of a row with an inverse is its inverse


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Which sigmas are drawn and how they weigh."""

    timestep_sampling: Literal["uniform", "stratified", "logit_normal", "mode"] = "uniform"
    logit_mean: float = 0.0  # of logit_normal
    logit_std: Positive = 1.0  # of logit_normal
    mode_scale: ModeScale = 1.29  # of mode
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    shift: Literal["auto", "none"] | float = "auto"  # auto: the scheduler's mu at the target's tokens; a number: mu


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters in place of full fine-tuning."""

    rank: Count = 32
    alpha: Positive = 32.0  # the adapter's output is scaled by alpha / rank
    dropout: Dropout = 0.0
    target_modules: Literal["attention", "attention+mlp", "all-linear"] | Names = "attention"
    init_from: PathName | None = None  # adapters to go on from: a folder or a Hub id


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """What is trained."""

    lora: Lora | None = None  # null: full fine-tuning of `modules`
    modules: Names = (".",)  # dotted-name parts that train; a part matches whole components, "." is all
    low_lr_modules: tuple[Name, ...] = ()  # these train at half the rate


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The picture grid while training."""

    every: Whole = 0  # steps; 0: none
    rows: Count = 4  # held-out rows at fixed seeds
    num_inference_steps: Count = 20
    true_cfg_scale: Weight = 4.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that both runs are told."""

    path: Path = field(compare=False, metadata={"key": False})  # of the file it was read from
    model: PathName = "Qwen/Qwen-Image-Edit-2509"  # Hub id, or a folder in diffusers layout
    revision: Name | None = None
    seed: Seed = 0  # the only seed
    tasks: Mapping[TaskName, Task]
    extract: Extract = field(default_factory=Extract)
    mix: Mix = field(default_factory=Mix)
    loss: Loss = field(default_factory=Loss)
    trainable: Trainable = field(default_factory=Trainable)
    sampling: Sampling = field(default_factory=Sampling)
    training: Mapping[str, Any] = field(default_factory=dict)  # TrainingArguments, with our defaults


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
        raise InputError(f"{path}: {error.strerror}; wanted a recipe, then overrides a.b.c=value") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: got {show(raw)}, wanted a mapping with at least `tasks`")
    for text in overrides:
        override(raw, text)
    try:
        recipe = build(Recipe, raw, path=path)
        recipe = replace(recipe, training=MappingProxyType(check_training(recipe.training)))
        _check_together(recipe)
    except Misfit as misfit:
        at, message = misfit.args
        by = [text for text in overrides if re.match(re.escape(text.partition("=")[0]) + r"(\W|$)", at)]
        raise InputError(f"{path}: {f'override {by[-1]!r}: ' if by else ''}{at}: {message}") from None
    return recipe


def as_dict(value: Any) -> Any:
    """A recipe, or a part of one, as plain mappings, lists and scalars: what YAML and JSON hold, defaults filled in.

    A default list of captions stays out: once it is named, each of its columns must occur in the data.
    """
    if is_dataclass(value):
        keys = {f.name: getattr(value, f.name) for f in fields(value) if not f.metadata}
        if isinstance(value, Columns):
            keys = {k: v for k, v in keys.items() if "captions" not in k or set(v) <= set(value.required)}
        return as_dict(keys)
    if isinstance(value, Mapping):
        return {key: as_dict(item) for key, item in value.items()}
    return [as_dict(item) for item in value] if isinstance(value, list | tuple) else value


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe to the file `path`; loading it gives an equal `Recipe`."""
    path.write_text(write_yaml(as_dict(recipe)), encoding="utf-8")


def _check_together(recipe: Recipe) -> None:
    """What no single value shows."""
    for name, task in recipe.tasks.items():
        if not task.data and task.embeddings is None:
            raise Misfit(f"tasks.{name}.data", "missing, and no ready set in `embeddings` takes its place")
        inverse, forward = map(len, (task.columns.inverse_captions, task.columns.captions))
        if inverse > forward:
            rule = f"got {inverse} for {forward} captions; the i-th is the inverse of the i-th"
            raise Misfit(f"tasks.{name}.columns.inverse_captions", rule)
    if not any(task.weight for task in recipe.tasks.values()):
        raise Misfit("tasks", "wanted at least one task with a weight above 0")
    if recipe.training.get("eval_strategy", "no") != "no" and not any(t.eval_rows for t in recipe.tasks.values()):
        raise Misfit("training.eval_strategy", "no task holds out rows to evaluate on; set tasks.<name>.eval_rows")
    if recipe.sampling.every and not any(task.eval_rows for task in recipe.tasks.values()):
        raise Misfit("sampling.every", "no task holds out rows to make pictures of; set tasks.<name>.eval_rows")
    for key in ("source_count_weights", "caption_weights"):
        weights = getattr(recipe.mix, key)
        if weights is not None and not any(weights.values()):
            raise Misfit(f"mix.{key}", "wanted at least one weight above 0, or null")
    if any(task.embeddings for task in recipe.tasks.values()):
        return  # a ready set has captions of its own, which are known once it is open
    captions = {caption: None for task in recipe.tasks.values() for caption in task.columns.captions}
    for caption in recipe.mix.caption_weights or ():
        if caption not in captions and re.sub(r"_[0-9]+$", "", caption) not in captions:  # a text of a list
            raise Misfit(f"mix.caption_weights.{caption}", unknown(caption, captions))
