"""The recipe: what it accepts, what each mistake is told, and that all of it shows before torch is imported."""

import json
import re
import textwrap
from contextlib import suppress
from typing import Annotated, get_args

import pytest
from pydantic import ValidationError

from hf_qie import check
from hf_qie.config.data import Columns
from hf_qie.config.evaluation import Sampling
from hf_qie.config.memory import Memory
from hf_qie.config.recipe import (
    Extract,
    Lora,
    Loss,
    Mix,
    Recipe,
    Task,
    Trainable,
    as_dict,
    load_recipe,
    recipe_schema,
    save_recipe,
)
from hf_qie.config.training_args import training_arguments
from hf_qie.errors import InputError
from hf_qie.runtime.rules import validate

GOOD = "tasks: {portraits: {data: pairs.jsonl}}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write `lora.yaml` into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        text = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
        (tmp_path / "lora.yaml").write_bytes(text)
        return "lora.yaml"

    return write


def message(path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_defaults_fill_what_a_recipe_leaves_out(write):
    recipe = load_recipe(write(GOOD))
    task = recipe.tasks["portraits"]
    assert recipe.model == "Qwen/Qwen-Image-Edit-2509"
    assert task == Task(name="portraits", data=("pairs.jsonl",))
    assert task.columns == Columns(
        sources="source_image",
        target="target_image",
        captions=("instruction", "instruction_cn"),
        inverse_captions=("inverse_instruction", "inverse_instruction_cn"),
    )
    assert (recipe.extract.image_sample_size, recipe.mix.caption_dropout, recipe.loss.shift) == (512, 0.05, "auto")
    assert recipe.trainable.lora is None
    assert recipe.training == {
        "output_dir": "outputs/run",
        "learning_rate": 2e-5,
        "logging_steps": 10,
        "save_steps": 100,
        "max_steps": 512,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
    }


def test_every_kind_of_value_arrives_as_its_annotation_says(write):
    recipe = load_recipe(
        write("""
            tasks:
              a: {data: [a.jsonl, b.jsonl], weight: 2, columns: {captions: [x, y], inverse_captions: [z]}}
              b: {embeddings: "org/set:b@main", weight: 0}
            mix: {source_count_weights: {0: 1, 3: 0}, caption_weights: {x: 1}, same_shape: 4}
            loss: {shift: 0.7}
            trainable: {lora: {rank: 8, target_modules: [to_q]}, low_lr_modules: [proj_out]}
            training:
              lr_scheduler_kwargs: {num_cycles: 2}
        """)
    )
    a, b = recipe.tasks.values()
    assert (a.data, a.weight, type(a.weight)) == (("a.jsonl", "b.jsonl"), 2.0, float)
    assert a.columns.required == ("x", "y", "z")
    assert (b.data, b.embeddings) == ((), "org/set:b@main")
    assert recipe.mix.source_count_weights == {0: 1.0, 3: 0.0}
    assert recipe.loss.shift == 0.7
    assert recipe.trainable.lora == Lora(rank=8, alpha=32.0, dropout=0.0, target_modules=("to_q",), init_from=None)
    assert recipe.training["lr_scheduler_kwargs"] == {"num_cycles": 2}


def test_a_section_with_every_line_commented_out_is_its_default(write):
    assert load_recipe(write(GOOD + "mix:\n  # caption_dropout: 0.1\n")) == load_recipe(write(GOOD))


def test_nothing_in_a_recipe_can_be_changed(write):
    recipe = load_recipe(write(GOOD))
    with pytest.raises(ValidationError):
        recipe.tasks["portraits"].weight = 2.0
    for mapping in (recipe.tasks, recipe.training):
        with pytest.raises(TypeError):
            mapping["portraits"] = None


# --- what each mistake is told ---------------------------------------------------------------------------------------

BAD_FILES = {
    "tasks: {portraits: {data: a, wieght: 1}}": "tasks.portraits.wieght: unknown key, did you mean 'weight'?",
    GOOD + "zzz: 1": "zzz: unknown key, known: model, revision, seed, tasks, extract, mix, loss, trainable, "
    "ema, memory, sampling, evaluation, training",
    "seed: 1": "tasks: missing",
    "tasks: {}": "tasks: expected at least one task with a weight above 0",
    "tasks: {a: {data: x, weight: 0}}": "tasks: expected at least one task with a weight above 0",
    "tasks: [{data: x}]": 'tasks: got [{"data": "x"}], expected a mapping',
    "tasks: {a-b: {data: x}}": 'tasks.a-b: got "a-b", expected a name of letters, digits and _ that does not start '
    "with a digit",
    "tasks: {1: {data: x}}": "tasks.1: got 1, expected a name of letters, digits and _ that does not start "
    "with a digit",
    "tasks: {a: {}}": "tasks.a.data: missing, and no ready set in `embeddings` takes its place",
    "tasks: {a: {data: x, name: b}}": "tasks.a.name: unknown key, known: data, split, image_root, "
    "columns, weight, t2i, eval_rows, embeddings",
    "tasks: {a: {data: [x, 1]}}": "tasks.a.data[1]: got 1, expected a string that is not blank",
    "tasks: {a: {data: x, weight: -1}}": "tasks.a.weight: got -1, expected a number of at least 0",
    "tasks: {a: {data: x, weight: .inf}}": "tasks.a.weight: got Infinity, expected a number of at least 0",
    "tasks: {a: {data: x, weight: .nan}}": "tasks.a.weight: got NaN, expected a number of at least 0",
    "tasks: {a: {data: x, t2i: yes}}": 'tasks.a.t2i: got "yes", expected true or false',
    "tasks: {a: {data: x, columns: {captions: [c], inverse_captions: [d, e]}}}": "tasks.a.columns.inverse_captions: "
    "got 2 for 1 captions; the i-th is the inverse of the i-th",
    "tasks: {a: {data: x, columns: {captions: [drop]}}}": 'tasks.a.columns.captions: got ["drop"], expected a list of '
    "different column names, none of them drop, image_embeds, image_slots, num_sources, prefix_embeds, row, "
    "source_grids, source_image, source_latents, target_grid, target_image, target_latents",
    GOOD + "model: ' '": 'model: got " ", expected a string that is not blank',
    GOOD + "seed: 4294967296": "seed: got 4294967296, expected an integer from 0 to 4294967295",
    GOOD + "seed: true": "seed: got true, expected an integer from 0 to 4294967295",
    GOOD + "extract: {batch_size: 0}": "extract.batch_size: got 0, expected an integer of at least 1",
    GOOD + "extract: {batch_size: 4.0}": "extract.batch_size: got 4.0, expected an integer of at least 1",
    GOOD + "extract: {image_sample_size: 32}": "extract.image_sample_size: got 32, expected an integer of at least 64",
    GOOD + "extract: {dtype: bf16}": "extract.dtype: got \"bf16\", expected 'auto', 'bfloat16', 'float16' or "
    "'float32'",
    GOOD + "extract: {max_bad_share: 1.5}": "extract.max_bad_share: got 1.5, expected a number from 0 to 1",
    GOOD + "extract: 3": "extract: got 3, expected a mapping",
    GOOD + "mix: {same_shape: 0}": "mix.same_shape: got 0, expected an integer of at least 1",
    GOOD + "mix: {draws_per_row: 3}": "mix.draws_per_row: got 3, but training.per_device_train_batch_size, which "
    "counts draws, is 8; make it a multiple",
    GOOD + "mix: {source_count_weights: {one: 1}}": 'mix.source_count_weights.one: got "one", expected an integer of '
    "at least 0",
    GOOD + "mix: {source_count_weights: {0: 0, 1: 0}}": "mix.source_count_weights: expected at least one weight above "
    "0, or null",
    GOOD + "mix: {caption_weights: {instuction: 1}}": "mix.caption_weights.instuction: unknown key, did you mean "
    "'instruction'?",
    GOOD + "loss: {shift: maybe}": "loss.shift: got \"maybe\", expected 'auto' or 'none' or a number",
    GOOD + "loss: {logit_std: 0}": "loss.logit_std: got 0, expected a number above 0",
    GOOD + "loss: {mode_scale: 2}": "loss.mode_scale: got 2, expected a number from -1 to 1.75",
    GOOD + "trainable: {modules: []}": "trainable.modules: got [], expected a list of at least one name",
    GOOD + "trainable: {lora: {rank: '8'}}": 'trainable.lora.rank: got "8", expected an integer of at least 1',
    GOOD + "trainable: {lora: {target_modules: atention}}": "trainable.lora.target_modules: got \"atention\", "
    "expected 'attention', 'attention+mlp' or 'all-linear' or a list of at least one name",
    GOOD + "trainable: {lora: {dropout: 1}}": "trainable.lora.dropout: got 1, expected a number from 0 to below 1",
    GOOD + "memory: {quantization: int4}": "memory.quantization: got \"int4\", expected 'fp8', 'int8' or 'nf4'",
    GOOD + "memory: {quantization: nf4}": 'memory.quantization: got "nf4", but only a frozen base can be; set '
    "trainable.lora",
    GOOD + "memory: {quantization: nf4}\ntrainable: {lora: {}}": 'memory.quantization: got "nf4"; it needs '
    "training.activation_checkpointing: true",
    GOOD + "memory: {stream_blocks: 30}": "memory.stream_blocks: got 30, but only a frozen base can be; set "
    "trainable.lora",
    GOOD + "memory: {stream_blocks: 30}\ntrainable: {lora: {}}": "memory.stream_blocks: got 30; it needs "
    "training.activation_checkpointing: true",
    GOOD + "memory: {offload_activations: true}": "memory.offload_activations: got true; it needs "
    "training.activation_checkpointing: true",
    GOOD + "memory: {offload_activations: true}\n"
    "training: {activation_checkpointing: false, gradient_checkpointing: true}": "memory."
    "offload_activations: got true; it needs training.activation_checkpointing: true",
    GOOD + "memory: {stream_blocks: 2}\ntrainable: {lora: {}}\ntraining: {activation_checkpointing: true}": "memory."
    "stream_blocks: got 2, expected 0 or more than 2, which are always on the device",
    GOOD + "trainable: {lora: true}": "trainable.lora: got true, expected a mapping",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_value_is_named_by_file_and_address(write, text):
    assert message(write(text)) == f"lora.yaml: {BAD_FILES[text]}"


def test_a_merge_key_brings_what_the_section_does_not_say_itself(write):
    recipe = load_recipe(
        write("""
        tasks:
          a: &a {data: x, weight: 2, columns: {target: out}}
          b: {data: y, <<: *a}
          c: {<<: [{weight: 3}, *a], split: test}
          d: *a
        """),
        ["tasks.b.columns.target=other"],
    )
    told = [(task.data[0], task.weight, task.columns.target, task.split) for task in recipe.tasks.values()]
    assert told[:2] == [("x", 2.0, "out", "train"), ("y", 2.0, "other", "train")]
    assert told[2:] == [("x", 3.0, "out", "test"), ("x", 2.0, "out", "train")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "lora.yaml: got null, expected a mapping with at least `tasks`"),
        ("- a", 'lora.yaml: got ["a"], expected a mapping with at least `tasks`'),
        ("seed: 1\nmodel: a\nseed: 2\n", 'lora.yaml, line 3: key "seed" again, it is in line 1 already'),
        ("tasks:\n  a: {t2i: true,\n   t2i: false}\n", 'lora.yaml, line 3: key "t2i" again, it is in line 2 already'),
        ("seed: 1\n\tmodel: a\n", "lora.yaml, line 2: found character '\\t' that cannot start any token"),
        ("seed: 1\nmodel: a: b\n", "lora.yaml, line 2: mapping values are not allowed here"),
        ("seed: *one\n", "lora.yaml, line 1: found undefined alias 'one'"),
        ("a: &a [*a]\n", "lora.yaml, line 1: found unconstructable recursive node"),
        ("? [a]\n: 1\n", 'lora.yaml, line 1: got ["a"] as a key, expected a word or number'),
        ("a: 1\n---\nb: 1\n", "lora.yaml, line 2: but found another document"),
        (
            "seed: !!python/name:os.x a\n",
            "lora.yaml, line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.x'",
        ),
        (
            "seed: !!set {1}\n",
            "lora.yaml, line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:set'",
        ),
        ("seed: !!float [1]\n", "lora.yaml, line 1: expected a scalar node, but found sequence"),
        (
            "a: &a [1]\nb: {<<: *a}\n",
            "lora.yaml, line 1: got 1, expected a mapping or a list of mappings to merge",
        ),
        (
            '{"<<": 1}',
            "lora.yaml: <<: unknown key, known: model, revision, seed, tasks, extract, mix, loss, "
            "trainable, ema, memory, sampling, evaluation, training",
        ),
        ("seed: !!int x\n", "lora.yaml: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_text_that_is_no_recipe_is_named_by_file_and_line(write, text, told):
    assert message(write(text)) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD + f"loss: {{shift: 1{'0' * 400}}}", "loss.shift: got 1000"),
        (GOOD + f"loss: {{logit_std: 1{'0' * 400}}}", "loss.logit_std: got 1000"),
        (GOOD + f"training: {{learning_rate: 1{'0' * 400}}}", "training.learning_rate: got 1000"),
        (GOOD + f"seed: 0x{'f' * 5000}", 'seed: got "0xfff'),
        (GOOD + 'revision: "\\U80001000"', "lora.yaml: "),
        (GOOD + f"seed: {'9' * 5000}", "lora.yaml: Exceeds the limit (4300 digits)"),
        ("tasks: " + "[" * 3000 + "]" * 3000, "nested too deeply; a recipe has five levels at most"),
        (GOOD + "training: {fsdp_config: {0.5: 1}}", "training.fsdp_config.0.5: unknown key"),
        ("- " * 3000, "nested too deeply; a recipe has five levels at most"),
    ],
)
def test_what_is_too_large_too_deep_or_no_name_is_refused(write, text, told):
    with pytest.raises(InputError, match=re.escape(told)):
        load_recipe(write(text))


def test_a_file_that_is_not_utf8_is_refused(write):
    assert message(write(b"model: \xff\n")).startswith("lora.yaml: ")


def test_a_missing_file_says_what_comes_first(write):
    told = "No such file or directory; expected a recipe, then overrides a.b.c=value"
    assert message("seed=1") == f"seed=1: {told}"
    assert message("~nobody1/a.yaml") == f"~nobody1/a.yaml: {told}"


# --- paths -----------------------------------------------------------------------------------------------------------

WITH_PATHS = """
model: $MODELS/edit
tasks:
  a: {data: ["~/a/*.jsonl", "${DATA}/b.jsonl"], image_root: $DATA}
  b: {data: ~/c.jsonl, embeddings: ~/sets/b}
extract: {output_dir: ~/out/emb}
trainable: {lora: {init_from: $MODELS/lora}}
training: {output_dir: ~/run}
"""


@pytest.fixture
def environment(monkeypatch):
    """Where the variables of WITH_PATHS lead."""
    for name, value in {"HOME": "/home/me", "DATA": "~/data", "MODELS": "/models"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOWHERE", raising=False)


def test_home_and_variables_are_replaced_in_every_key_that_is_a_path(write, environment, tmp_path):
    recipe = load_recipe(write(WITH_PATHS))
    a, b = recipe.tasks.values()
    assert recipe.model == "/models/edit"
    assert (a.data, a.image_root) == (("/home/me/a/*.jsonl", "/home/me/data/b.jsonl"), "/home/me/data")
    assert (b.data, b.embeddings) == (("/home/me/c.jsonl",), "/home/me/sets/b")
    assert (recipe.extract.output_dir, recipe.trainable.lora.init_from) == ("/home/me/out/emb", "/models/lora")
    assert recipe.training["output_dir"] == "/home/me/run"
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert not {"~", "$"} & set((tmp_path / "saved.yaml").read_text())
    assert as_dict(load_recipe(tmp_path / "saved.yaml")) == as_dict(recipe)


def test_an_override_and_the_recipe_itself_may_begin_at_home(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(GOOD)
    recipe = load_recipe("~/lora.yaml", ["extract.output_dir=~/sets", "training.output_dir=~/run"])
    assert (recipe.extract.output_dir, recipe.training["output_dir"]) == (f"{tmp_path}/sets", f"{tmp_path}/run")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("$NOWHERE/x", "the environment variable NOWHERE is not set; set it, or write the path out"),
        ("a/${NOWHERE}", "the environment variable NOWHERE is not set; set it, or write the path out"),
        ("$TWICE", "the environment variable NOWHERE is not set; set it, or write the path out"),
        ("~nobody1/x", "~nobody1 is not the home of a user; write ./~nobody1 for a file or folder of that name"),
    ],
)
def test_a_path_that_leads_nowhere_names_the_variable(write, environment, monkeypatch, path, told):
    monkeypatch.setenv("TWICE", "$NOWHERE")  # it would be another path each time that the recipe is read
    for key in ("tasks.portraits.data", "extract.output_dir", "training.output_dir", "model"):
        override = f"{key}={path}"
        told_of = f"lora.yaml: override {override!r}: {key}{'[0]' * key.endswith('data')}: "
        assert message(write(GOOD), override) == f'{told_of}got "{path}": {told}'


def test_a_name_with_a_dollar_or_tilde_inside_stays_as_it_is(write):
    assert load_recipe(write(GOOD), ["tasks.portraits.data=[a$, 'b[$]c.jsonl', ./~d]"]).tasks["portraits"].data == (
        "a$",
        "b[$]c.jsonl",
        "./~d",
    )


# Keys that take any string; one more has to be put here, or be a PathName.
NO_PATHS = {"revision", "split", "license", "sources", "target", "modules", "low_lr_modules", "target_modules"}
NO_PATHS |= {"drop_caption", "push_to_hub", "captions", "inverse_captions"}
PATHS = {"model", "data", "image_root", "embeddings", "output_dir", "init_from"}


def test_a_key_that_takes_any_string_is_a_path_or_says_that_it_is_none(write, environment):
    sections = [Recipe, Task, Columns, Extract, Mix, Loss, Lora, Trainable, Memory, Sampling]
    strings = {"string": set(), "path": set()}
    for section in sections:
        for key, rule in section.model_fields.items():
            kind = Annotated[rule.annotation, *rule.metadata] if rule.metadata else rule.annotation
            for given in ("$DATA/x", ["$DATA/x"]):
                with suppress(InputError):
                    value = validate(kind, given)
                    if not rule.exclude:
                        strings["string" if "$DATA/x" in (value, *value) else "path"].add(key)
    assert strings == {"string": NO_PATHS, "path": PATHS}
    theirs = {key for key, (kind, _) in training_arguments().items() if str in (kind, *get_args(kind))}
    assert {key for key in theirs if re.search("dir|path|file|folder", key)} == {"output_dir"}


# --- overrides -------------------------------------------------------------------------------------------------------


def test_an_override_sets_old_and_new_keys_and_whole_sections(write):
    path = write(GOOD)
    recipe = load_recipe(
        path,
        [
            "tasks.portraits.weight=1e1",
            "tasks.faces.data=faces.jsonl",
            "tasks.faces.columns={captions: [text], inverse_captions: []}",
            "mix.source_count_weights.2=3",
            "trainable.lora.rank=4",
            "extract.drop_caption=' = '",
            "training.optim=sgd",
            "training.optim_args=a=1,b=2",
            "seed=1",
            "seed=2",
        ],
    )
    assert recipe.tasks["portraits"].weight == 10.0
    assert recipe.tasks["faces"].columns == Columns(captions=("text",), inverse_captions=())
    assert recipe.mix.source_count_weights == {2: 3.0}
    assert recipe.trainable.lora == Lora(rank=4)
    assert recipe.extract.drop_caption == " = "
    assert recipe.training["optim_args"] == "a=1,b=2"
    assert recipe.seed == 2


def test_the_default_inverse_captions_are_at_most_as_many_as_the_captions(write):
    recipe = load_recipe(write("tasks: {a: {data: x, columns: {captions: [prompt]}}}"))
    assert recipe.tasks["a"].columns.inverse_captions == ("inverse_instruction",)
    assert as_dict(recipe)["tasks"]["a"]["columns"]["captions"] == ["prompt"]
    assert "inverse_captions" not in as_dict(recipe)["tasks"]["a"]["columns"]


def test_sources_are_one_column_or_several(write, tmp_path):
    for given in ("control", ["control_0", "control_1"]):
        recipe = load_recipe(write(f"tasks: {{a: {{data: x, columns: {{sources: {json.dumps(given)}}}}}}}"))
        assert as_dict(recipe)["tasks"]["a"]["columns"]["sources"] == given
        save_recipe(recipe, tmp_path / "again.yaml")
        assert as_dict(load_recipe(tmp_path / "again.yaml")) == as_dict(recipe)


def test_an_override_of_one_task_leaves_an_aliased_one_alone(write):
    path = write("""
        tasks:
          a: {data: x, columns: &names {target: out}}
          b: {data: y, columns: *names}
    """)
    recipe = load_recipe(path, ["tasks.a.columns.target=other"])
    assert [task.columns.target for task in recipe.tasks.values()] == ["other", "out"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("extract.batch_size=0", "extract.batch_size: got 0, expected an integer of at least 1"),
        ("extract={batch_size: 0}", "extract.batch_size: got 0, expected an integer of at least 1"),
        ("tasks.portraits.wieght=1", "tasks.portraits.wieght: unknown key, did you mean 'weight'?"),
        ("tasks.portraits.data=[1]", "tasks.portraits.data[0]: got 1, expected a string that is not blank"),
        ("training.seed=1", "training.seed: got 1, leave it out: the top-level seed is the only one"),
    ],
)
def test_a_bad_value_names_the_override_it_came_from(write, override, told):
    assert message(write(GOOD), "seed=1", override) == f"lora.yaml: override {override!r}: {told}"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "expected a.b.c=value"),
        ("--seed", "expected a.b.c=value"),
        ("=1", "expected a.b.c=value"),
        ("a..b=1", "expected a.b.c=value"),
        ("seed.x=1", "seed is 3, which has no keys"),
    ],
)
def test_an_override_without_an_address_is_refused(write, override, told):
    assert message(write(GOOD + "seed: 3"), override) == f"override {override!r}: {told}"


def test_an_override_that_is_no_yaml_is_refused(write):
    told = "expected ',' or ']', but got '<stream end>'"
    assert message(write(GOOD), "tasks.a.data=[x") == f"override 'tasks.a.data=[x', line 1: {told}"


def test_the_default_of_what_is_refused_may_be_written(write):
    text = "extract: {latents: true, shard: null}\nsampling: {every: 0}\ntraining: {eval_strategy: no, fsdp: null}\n"
    assert load_recipe(write(GOOD + text)).training["eval_strategy"] == "no"


# --- saving ----------------------------------------------------------------------------------------------------------

FULL = """
tasks:
  a: {data: [a.jsonl, "1e5"], weight: 1e-3, columns: {captions: [yes, 1e, é], inverse_captions: []}}
  b: {embeddings: org/b, weight: 0, t2i: true, columns: {captions: [instruction, instruction_cn]}}
  c: {data: c, columns: {target: out}}
mix: {source_count_weights: {0: 1, 3: 0.25}, caption_weights: {instruction: 1, yes: 0}}
loss: {shift: none}
trainable: {lora: {alpha: 16, target_modules: [to_q, to_k]}}
training: {num_train_epochs: 2.5, lr_scheduler_kwargs: {a: [1, null]}, output_dir: "a: b"}
"""


@pytest.mark.parametrize("text", [GOOD, FULL])
def test_a_saved_recipe_loads_as_an_equal_one(write, tmp_path, text):
    recipe = load_recipe(write(text), ["seed=7"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.path != recipe.path
    assert again.model_copy(update={"path": recipe.path}) == recipe


def test_a_saved_recipe_holds_every_key_of_the_sections(write):
    saved = as_dict(load_recipe(write(GOOD)))
    assert list(saved) == Recipe.key_names()
    assert saved["extract"]["dtype"] == "auto"
    assert saved["training"]["max_steps"] == 512


def test_a_default_list_of_captions_is_saved_as_none_so_that_it_stays_optional(write):
    columns = as_dict(load_recipe(write(GOOD)).tasks["portraits"].columns)
    assert columns == {"sources": "source_image", "target": "target_image"}


def test_every_recipe_of_the_repository_is_one(root):
    paths = sorted((root / "recipes").glob("*.yaml"))
    assert len(paths) >= 2
    for path in paths:
        load_recipe(path)


# --- the JSON schema -------------------------------------------------------------------------------------------------


def test_the_stored_schema_is_that_of_the_recipe_and_every_recipe_names_it(root, capsys):
    check.main(["--schema"])
    assert (root / "recipes" / "recipe.schema.json").read_text(encoding="utf-8") == capsys.readouterr().out
    for path in (root / "recipes").glob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")


def test_the_schema_has_every_key_that_a_recipe_may_have():
    schema = recipe_schema()
    assert list(schema["properties"]) == Recipe.key_names()
    assert list(schema["$defs"]["Task"]["properties"]) == Task.key_names()
    training = schema["properties"]["training"]["properties"]
    assert {"learning_rate", "fsdp_config", "eval_strategy"} <= training.keys()
    assert not {"seed", "hub_token", "do_train"} & training.keys()
    assert training["eval_strategy"]["enum"] == ["steps", "no"]
