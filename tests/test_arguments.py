"""`training:`: TrainingArguments' own names, what we refuse of them, and the reasons."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.training_args import OptimizerNames

from hf_qie.config.training_args import check_training, choices, refused, training_arguments
from hf_qie.errors import InputError
from hf_qie.runtime.yaml_io import read_yaml


def test_the_names_read_from_source_are_training_arguments_own():
    assert list(training_arguments()) == [f.name for f in fields(TrainingArguments) if f.init]


def test_the_defaults_read_from_source_are_training_arguments_own():
    own = {f.name: f.default for f in fields(TrainingArguments)}
    read = {name: default for name, (_, default) in training_arguments().items() if default is not None}
    assert len(read) > 50
    assert read == {name: getattr(own[name], "value", own[name]) for name in read}


def test_training_arguments_take_the_section_as_it_is():
    section = read_yaml("{learning_rate: 1e-4, lr_scheduler_type: cosine, report_to: none, use_cpu: true}", "here")
    arguments = TrainingArguments(**check_training(section))
    assert (arguments.learning_rate, arguments.max_steps, arguments.remove_unused_columns) == (1e-4, 512, False)


@pytest.mark.parametrize(
    "written", ["Optional[int]", "Union[int, None]", "SomeEnum", "None | Literal['a']", "typing.Optional[int]"]
)
def test_an_annotation_of_a_later_release_is_read_or_the_library_itself_is_asked(monkeypatch, written):
    def changed(path: Path, **options: Any) -> str:
        text, line = read(path, **options), "    torch_empty_cache_steps: int | None = field("
        assert line in text
        return text.replace(line, line.replace("int | None", written))

    known, read = training_arguments(), Path.read_text
    monkeypatch.setattr(Path, "read_text", changed)
    training_arguments.cache_clear()
    try:
        assert training_arguments().keys() == known.keys()
        assert training_arguments()["torch_empty_cache_steps"][0] == int | None
        with pytest.raises(InputError, match="expected an integer"):
            check_training({"torch_empty_cache_steps": "3"})
    finally:
        training_arguments.cache_clear()


def test_without_a_readable_source_the_library_itself_is_asked(monkeypatch):
    known = training_arguments()

    def unreadable(path: Path, **options: Any) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", unreadable)
    for cached in (training_arguments, choices):
        cached.cache_clear()
    try:
        found = training_arguments()
        assert {key: kind for key, (kind, _) in found.items()} == {key: kind for key, (kind, _) in known.items()}
        check_training({"optim": "adamw_later"})  # TrainingArguments refuses it
    finally:
        for cached in (training_arguments, choices):
            cached.cache_clear()


# --- every field works, is refused, or means nothing ----------------------------------------------------------------


def test_every_field_of_the_installed_release_is_in_one_of_the_lists():
    lists = [TAKEN.keys(), refused().keys() - {"group_by_length"}]  # a name of older releases
    assert sum(map(len, lists)) == len(training_arguments())
    assert set().union(*lists) == training_arguments().keys()


TAKEN = """
output_dir: other
per_device_train_batch_size: 3
num_train_epochs: 2.0
max_steps: 7
learning_rate: 0.5
lr_scheduler_type: cosine
lr_scheduler_kwargs: {num_cycles: 2}
warmup_steps: 0.25
optim: adamw_torch
optim_args: a=1
weight_decay: 0.25
adam_beta1: 0.5
adam_beta2: 0.5
adam_epsilon: 0.25
optim_target_modules: all-linear
gradient_accumulation_steps: 2
max_grad_norm: 0.5
bf16: true
fp16: true
tf32: false
activation_checkpointing: true
gradient_checkpointing: true
torch_compile: true
torch_compile_backend: eager
torch_compile_mode: default
torch_empty_cache_steps: 2
logging_steps: 20
logging_first_step: true
log_on_each_node: false
log_level: info
log_level_replica: info
disable_tqdm: true
report_to: [tensorboard]
run_name: mine
project: ours
trackio_space_id: a/b
trackio_bucket_id: c
trackio_static_space_id: a/d
eval_steps: 5
eval_delay: 2
per_device_eval_batch_size: 3
eval_on_start: true
eval_accumulation_steps: 2
save_only_model: true
save_steps: 200
save_total_limit: 2
load_best_model_at_end: true
metric_for_best_model: eval_loss_edit
greater_is_better: false
full_determinism: true
use_cpu: true
accelerator_config: {gradient_accumulation_kwargs: {sync_each_batch: true}}
dataloader_num_workers: 2
dataloader_pin_memory: false
dataloader_prefetch_factor: 3
ddp_bucket_cap_mb: 20
ddp_broadcast_buffers: true
ddp_static_graph: true
ddp_backend: gloo
ddp_timeout: 60
fsdp: true
fsdp_config: {fsdp_version: 2}
debug: [underflow_overflow]
skip_memory_metrics: false
"""
TAKEN = {line.partition(":")[0]: line for line in TAKEN.strip().splitlines()}
BESIDE = {  # what a key needs beside it
    "optim_args": {"optim": "sgd"},
    "optim_target_modules": {"optim": "galore_adamw"},
    "logging_steps": {"save_steps": 100},
    "load_best_model_at_end": {"eval_strategy": "steps", "eval_steps": 50},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
}


@pytest.mark.parametrize("key", sorted(TAKEN))
def test_what_works_reaches_training_arguments(key):
    given = read_yaml(TAKEN[key], "here")
    assert given[key] != training_arguments()[key][1]
    section = check_training(given | BESIDE.get(key, {}))
    assert section[key] == given[key]
    if key not in ("fsdp", "ddp_backend"):  # which need several processes
        made = getattr(TrainingArguments(**{"use_cpu": True} | section), key)
        made = made.to_dict() if key == "accelerator_config" else getattr(made, "value", made)
        assert given[key].items() <= made.items() if isinstance(made, dict) else made == given[key]


OTHER_THAN_DEFAULT = {bool: "true", int: "3", float: "0.25", str: "x", list: "[x]", dict: "{x: 1}"}


@pytest.mark.parametrize("key", sorted(refused().keys() - {"group_by_length"}))
def test_what_is_refused_may_be_null_or_what_is_accepted_and_the_message_has_the_reason(key):
    accepted, reason = refused()[key]
    for value in (None, *accepted):
        check_training({key: value})
    kinds = getattr(training_arguments()[key][0], "__args__", ())
    text = next((text for each, text in OTHER_THAN_DEFAULT.items() if each in kinds), "x")
    text = "false" if True in accepted else text
    with pytest.raises(InputError) as caught:
        check_training(read_yaml(f"{key}: {text}", "here"))
    assert caught.value.args[0] == f"training.{key}"
    assert caught.value.args[1].endswith(f": {reason}")


def test_the_names_read_from_source_are_the_librarys_own():
    assert choices("optim") == [name.value for name in OptimizerNames]
    assert choices("lr_scheduler_type") == [name.value for name in TYPE_TO_SCHEDULER_FUNCTION]


# --- what a bad key is told ------------------------------------------------------------------------------------------

REASONS = {
    "order": "the seed and the global batch alone fix the order of the rows",
    "steps": "evaluation, checkpoints and logs are counted in steps",
    "seed": "the top-level seed is the only one",
    "save": "only there does a resumed run log the same",
}
BAD_TRAINING = {
    "lerning_rate: 1": "lerning_rate: unknown key, did you mean 'learning_rate'?",
    "learning_rate: '1'": 'learning_rate: got "1", expected a number',
    "learning_rate: .nan": "learning_rate: got NaN, expected a finite number",
    "max_steps: 1.5": "max_steps: got 1.5, expected an integer",
    "max_steps: true": "max_steps: got true, expected an integer",
    "max_steps: 0": "max_steps: got 0, expected a whole number of at least 1",
    "bf16: yes": 'bf16: got "yes", expected true or false',
    "lr_scheduler_type: 1": "lr_scheduler_type: got 1, expected a string",
    "report_to: 1": "report_to: got 1, expected a string or a list",
    "num_train_epochs: 0": "num_train_epochs: got 0, expected a number above 0",
    "num_train_epochs: 1\nmax_steps: 9": "max_steps: num_train_epochs is given too; leave one of them out",
    "logging_steps: 0.1": "logging_steps: got 0.1, expected a whole number of at least 1",
    "logging_steps: 30": f"save_steps: got 100, expected a multiple of logging_steps, which is 30: {REASONS['save']}",
    "seed: 1": f"seed: got 1, leave it out: {REASONS['seed']}",
    "data_seed: 1": f"data_seed: got 1, leave it out: {REASONS['seed']}",
    "hub_token: t": 'hub_token: got "t", leave it out: a recipe is saved and shared; set HF_TOKEN in the environment',
    "eval_strategy: epoch": f'eval_strategy: got "epoch", expected "steps" | "no": {REASONS["steps"]}',
    "save_strategy: epoch": f'save_strategy: got "epoch", expected "steps" | "no": {REASONS["steps"]}',
    "logging_strategy: epoch": f'logging_strategy: got "epoch", expected "steps" | "no": {REASONS["steps"]}',
    "accelerator_config: {split_batches: true}": "accelerator_config.split_batches: got true, expected false: "
    + REASONS["order"],
    "accelerator_config: {dispatch_batches: true}": "accelerator_config.dispatch_batches: got true, expected false: "
    + REASONS["order"],
    "accelerator_config: {even_batches: false}": "accelerator_config.even_batches: got false, expected true: "
    + REASONS["order"],
    "accelerator_config: {even_batch: false}": "accelerator_config.even_batch: unknown key, did you mean "
    "'even_batches'?",
    "auto_find_batch_size: true": f"auto_find_batch_size: got true, expected false: {REASONS['order']}",
    "group_by_length: true": f"group_by_length: got true, leave it out: {REASONS['order']}",
    "train_sampling_strategy: group_by_length": 'train_sampling_strategy: got "group_by_length", expected "random": '
    + REASONS["order"],
    "ddp_find_unused_parameters: true": "ddp_find_unused_parameters: got true, expected false: every parameter "
    "that trains gets a gradient",
    "ignore_data_skip: true": "ignore_data_skip: got true, expected false: a resumed run "
    "continues at the row where it stopped",
    "fsdp_config: a.json": 'fsdp_config: got "a.json", expected a mapping',
    "fsdp_config: {stat_dict_type: x}": "fsdp_config.stat_dict_type: unknown key, did you mean 'state_dict_type'?",
    "fsdp_config: {state_dict_type: LOCAL_STATE_DICT}": 'fsdp_config.state_dict_type: got "LOCAL_STATE_DICT", '
    "expected 'FULL_STATE_DICT' or 'SHARDED_STATE_DICT'",
    "fsdp_config: {version: true}": "fsdp_config.version: got true, expected 1 or 2",
    "fsdp_config: {cpu_offload: yes}": 'fsdp_config.cpu_offload: got "yes", expected true or false',
    "remove_unused_columns: true": "remove_unused_columns: got true, expected false: the collator needs every column",
    "resume_from_checkpoint: outputs/run": 'resume_from_checkpoint: got "outputs/run", leave it out: a run '
    "resumes by itself from the last complete checkpoint in training.output_dir; to start from other weights, set "
    "trainable.lora.init_from, or name their folder as model",
    "warmup_ratio: 0.1": "warmup_ratio: unknown key, warmup_steps below 1 is a share of all steps: warmup_steps: 0.1",
    "mixed_precision: bf16": "mixed_precision: unknown key, set training.bf16: true, or launch with accelerate launch "
    "--mixed_precision bf16",
    "no_cuda: true": "no_cuda: unknown key, it is use_cpu",
    "max_train_steps: 9": "max_train_steps: unknown key, did you mean 'max_steps'?",
    "zzz: 1": "zzz: unknown key; expected one of transformers.TrainingArguments",
    "accelerator_config: a.json": 'accelerator_config: got "a.json", expected a mapping',
    "per_device_train_batch_size: 0": "per_device_train_batch_size: got 0, expected a whole number of at least 1",
    "weight_decay: -1": "weight_decay: got -1, expected a number of at least 0",
    "adam_beta2: 1": "adam_beta2: got 1, expected a number from 0 to below 1",
    "lr_scheduler_type: cosin": "lr_scheduler_type: got \"cosin\": unknown name, did you mean 'cosine'?",
    "log_level: loud": "log_level: got \"loud\", expected 'detail', 'debug', 'info', "
    "'warning', 'error', 'critical' or 'passive'",
    "lr_scheduler_type: constant\nlr_scheduler_kwargs: {num_cycles: 2}": "lr_scheduler_kwargs: without effect on the "
    "schedule constant; leave it out",
    "optim_args: a=1": "optim_args: without effect on adamw_torch; leave it out",
    "optim: sgd\noptim_args: momentum": 'optim_args: got "momentum", expected name=value,name=value',
    "optim_target_modules: all-linear": "optim_target_modules: adamw_torch does not use it",
    "logging_nan_inf_filter: true": "logging_nan_inf_filter: got true, expected false: a loss that is not finite must "
    "show",
}


@pytest.mark.parametrize("text", BAD_TRAINING)
def test_a_bad_key_is_named_with_its_reason(text):
    with pytest.raises(InputError) as caught:
        check_training(read_yaml(text, "here"))
    assert ": ".join(caught.value.args) == f"training.{BAD_TRAINING[text]}"


@pytest.mark.parametrize(
    "text",
    [
        "remove_unused_columns: false",
        "accelerator_config: {split_batches: false, dispatch_batches: null}",
        "logging_steps: 30\nsave_steps: 90",
        "logging_steps: 30\nsave_strategy: no",
        "warmup_steps: 10",
        "fsdp: true\nfsdp_config: {fsdp_version: 2, transformer_layer_cls_to_wrap: QwenImageTransformerBlock}",
    ],
)
def test_a_key_that_does_no_harm_is_taken_as_it_is(text):
    section = read_yaml(text, "here")
    assert section.items() <= check_training(section).items()


def test_null_leaves_our_default_and_their_not_set():
    section = check_training({"output_dir": None, "ddp_find_unused_parameters": None})
    assert section == check_training({})


def test_epochs_replace_the_default_number_of_steps():
    section = check_training({"num_train_epochs": 2})
    assert (section["num_train_epochs"], section.get("max_steps")) == (2, None)
