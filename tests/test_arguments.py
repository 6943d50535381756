"""`training:`: TrainingArguments' own names, what we refuse of them, and the reasons."""

from dataclasses import fields

import pytest
from transformers import TrainingArguments

from hf_qie.arguments import check_training, training_arguments
from hf_qie.settings import Misfit, read_yaml


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


REASONS = {
    "order": "the seed and the global batch alone fix the order of the draws",
    "steps": "draws are counted in steps, and no epoch ever ends",
    "seed": "the top-level seed is the only one",
    "save": "only there does a resumed run log the same",
}
BAD_TRAINING = {
    "lerning_rate: 1": "lerning_rate: unknown key, did you mean 'learning_rate'?",
    "learning_rate: '1'": 'learning_rate: got "1", wanted a number',
    "learning_rate: .nan": "learning_rate: got NaN, wanted a number",
    "max_steps: 1.5": "max_steps: got 1.5, wanted an integer",
    "max_steps: true": "max_steps: got true, wanted an integer",
    "max_steps: 0": "max_steps: got 0, wanted a whole number of at least 1",
    "bf16: yes": 'bf16: got "yes", wanted true or false',
    "lr_scheduler_type: 1": "lr_scheduler_type: got 1, wanted a string",
    "report_to: 1": "report_to: got 1, wanted null or a string or a list",
    "num_train_epochs: 0": "num_train_epochs: got 0, wanted a number above 0",
    "num_train_epochs: 1\nmax_steps: 9": "max_steps: num_train_epochs is given too; leave one of them out",
    "logging_steps: 0.1": "logging_steps: got 0.1, wanted a whole number of at least 1",
    "logging_steps: 30": f"save_steps: got 100, wanted a multiple of logging_steps, which is 30: {REASONS['save']}",
    "seed: 1": f"seed: got 1, leave it out: {REASONS['seed']}",
    "data_seed: 1": f"data_seed: got 1, leave it out: {REASONS['seed']}",
    "hub_token: t": 'hub_token: got "t", leave it out: a recipe is saved and shared; set HF_TOKEN in the environment',
    "eval_strategy: epoch": f'eval_strategy: got "epoch", wanted "steps" | "no": {REASONS["steps"]}',
    "save_strategy: epoch": f'save_strategy: got "epoch", wanted "steps" | "no": {REASONS["steps"]}',
    "logging_strategy: epoch": f'logging_strategy: got "epoch", wanted "steps" | "no": {REASONS["steps"]}',
    "accelerator_config: {split_batches: true}": "accelerator_config.split_batches: got true, wanted false: "
    + REASONS["order"],
    "accelerator_config: {dispatch_batches: true}": "accelerator_config.dispatch_batches: got true, wanted false | "
    f"null: {REASONS['order']}",
    "auto_find_batch_size: true": f"auto_find_batch_size: got true, wanted false: {REASONS['order']}",
    "group_by_length: true": f"group_by_length: got true, leave it out: {REASONS['order']}",
    "train_sampling_strategy: group_by_length": 'train_sampling_strategy: got "group_by_length", wanted "random": '
    + REASONS["order"],
    "ddp_find_unused_parameters: true": "ddp_find_unused_parameters: got true, wanted false | null: every parameter "
    "that trains gets a gradient",
    "ignore_data_skip: true": "ignore_data_skip: got true, wanted false: a resumed run goes on at the draw where it "
    "stopped",
    "fsdp_config: fsdp.json": 'fsdp_config: got "fsdp.json", wanted a mapping; write the keys of the file here',
    "fsdp_config: {fsdp_stat_dict_type: x}": "fsdp_config.fsdp_stat_dict_type: unknown key, did you mean "
    "'state_dict_type'?",
    "fsdp_config: {state_dict_type: LOCAL_STATE_DICT}": 'fsdp_config.state_dict_type: got "LOCAL_STATE_DICT", wanted '
    '"FULL_STATE_DICT" | "SHARDED_STATE_DICT"',
    "fsdp_config: {version: true}": "fsdp_config.version: got true, wanted 2 | 1",
    "fsdp_config: {cpu_offload: yes}": 'fsdp_config.cpu_offload: got "yes", wanted true or false',
    "remove_unused_columns: true": "remove_unused_columns: got true, wanted false: the collator needs every column",
    "logging_nan_inf_filter: true": "logging_nan_inf_filter: got true, wanted false: a loss that is not finite must "
    "show",
}


@pytest.mark.parametrize("text", BAD_TRAINING)
def test_a_bad_key_is_named_with_its_reason(text):
    with pytest.raises(Misfit) as caught:
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
