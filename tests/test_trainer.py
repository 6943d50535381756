"""A step is what its draws say, however it is cut and wherever the run was interrupted."""

import inspect
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import PartialState
from diffusers import AutoModel, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift
from embedding_sets import write_recipe, write_set
from ranks import without_pace
from safetensors import safe_open
from test_packed import by_diffusers, one_row
from training_runs import run, trainer_of
from transformers import Trainer, TrainerCallback

import hf_qie.training.callbacks
import hf_qie.training.checkpoints
import hf_qie.training.image_grid
import hf_qie.training.trainer
from hf_qie.data.loader import Draws
from hf_qie.data.seeding import draw_rng
from hf_qie.errors import InputError
from hf_qie.training.checkpoints import last_checkpoint
from hf_qie.training.model import parameters
from hf_qie.training.objective import noise_for
from hf_qie.training.trainer import PRIVATE, EditTrainer

LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}}
both_families = pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])
CUTS = {"4x1": (4, 1), "2x2": (2, 2), "1x4": (1, 4)}  # rows x accumulation
# beside the sets of one source and of none, two of this test's own
SOURCES_0_TO_3 = {"tasks": {name: {"data": f"{name}.jsonl"} for name in ("edit", "text_to_image", "two", "three")}}


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


def only(folder: Path) -> dict[str, dict]:
    """Tasks for a recipe that trains on one set."""
    return {"edit": {"embeddings": str(folder)}, "text_to_image": {"data": "none.jsonl", "weight": 0}}


def cut(rows: int, accumulation: int) -> tuple[str, str]:
    return f"training.per_device_train_batch_size={rows}", f"training.gradient_accumulation_steps={accumulation}"


def weights(trainer: EditTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters(trainer.model).items()}


def trained(trainer: EditTrainer) -> set[str]:
    return {name for name, p in parameters(trainer.model).items() if p.requires_grad}


def steps(trainer: EditTrainer) -> list[dict]:
    """What was logged for each step, but for the pace."""
    return [without_pace(entry) for entry in trainer.state.log_history if "loss" in entry]


def hold(trainer: EditTrainer, others: EditTrainer, atol: float = 0.0) -> None:
    ours, theirs = weights(trainer), weights(others)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# --- Trainer's private methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_method_of_trainer_is_as_we_know_it(name):
    found = str(inspect.signature(getattr(Trainer, name)))
    assert found == PRIVATE[name][0], (
        f"transformers {transformers.__version__} changed Trainer.{name}: {found}; read it, adapt EditTrainer and "
        "PRIVATE in hf_qie/training/trainer.py, and the bound in setup.py"
    )


def test_every_private_method_that_is_overridden_or_called_is_listed():
    theirs = {name for name in vars(Trainer) if re.match("_[a-z]", name)}
    source = inspect.getsource(hf_qie.training.trainer) + inspect.getsource(hf_qie.training.image_grid)
    used = set(re.findall(r"(?:trainer|self|super\(\))\.(_[a-z]\w+)\(", source)) | set(vars(EditTrainer))
    assert used & theirs == set(PRIVATE)


# --- one step --------------------------------------------------------------------------------------------------------


def plain_velocity(transformer: torch.nn.Module, batch: dict, noised: torch.Tensor, sigma: torch.Tensor):
    """What diffusers' transformer of the older family gives for a batch of one row without padding."""
    return transformer(
        hidden_states=torch.cat([noised, batch["source_latents"]], dim=1),
        encoder_hidden_states=batch["prompt_embeds"],
        timestep=sigma,
        img_shapes=[[(1, *grid) for grid in batch["grids"]]],
    ).sample[:, : noised.shape[1]]


@pytest.mark.parametrize("kind", ["edit_plus", "edit_plus_2511", "qwen_image_21"])
def test_the_loss_of_a_batch_is_the_plain_one_of_its_rows(tiny, tmp_path, kind):
    """Recomputed row by row and unpadded, with the checkpoint's scheduler and diffusers' transformer."""
    trainer = trainer_of(write_recipe(tmp_path, tiny(kind)), "seed=3")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny(kind), subfolder="scheduler")
    transformer = AutoModel.from_pretrained(str(tiny(kind)), subfolder="transformer")
    velocity = by_diffusers if kind == "qwen_image_21" else plain_velocity
    batch = next(one for one in trainer.get_train_dataloader() if len(one["grids"]) > 1)
    assert len(set(batch["prompt_lengths"])) > 1, "the rows should differ in prompt length"
    num_tokens, losses = batch["target_latents"].shape[1], []
    mu = calculate_shift(num_tokens, 256, 8192, 0.5, 0.9)  # the values of scheduler_config.json
    for i, draw in enumerate(batch["draw"]):
        u = torch.tensor(draw_rng(3, "sigma", draw).random(), dtype=torch.float32)
        sigma = scheduler.time_shift(mu, 1.0, u)
        latents = batch["target_latents"][i : i + 1].float()
        noise = noise_for([draw], latents.shape[1:], seed=3)
        row = one_row(batch, i)
        row |= {name: row[name].float() for name in ("prompt_embeds", "source_latents")}
        prediction = velocity(transformer, row, (1 - sigma) * latents + sigma * noise, sigma[None])
        losses.append((prediction - (noise - latents)).square().mean())
    # float32 attention over a padded length adds up in another order
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), sum(losses) / 4, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trainable", [{"modules": ["attn"]}, LORA], ids=["part", "lora"])
def test_ddp_is_left_what_trains_alone_and_keeps_no_second_copy_of_gradients(tiny, tmp_path, trainable):
    trainer = trainer_of(write_recipe(tmp_path, tiny(), trainable=trainable))
    frozen = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    assert frozen and set(trainer.model._ddp_params_and_buffers_to_ignore) == frozen
    assert trainer.accelerator.ddp_handler.to_kwargs()["gradient_as_bucket_view"]


@both_families
def test_no_two_draws_of_a_row_share_their_noise(tiny, tmp_path, family):
    """Neither within a micro-batch, nor within an accumulation window, nor from step to step."""
    write_set(tmp_path / "one", tiny(family), rows=1)
    trainer = trainer_of(
        write_recipe(tmp_path, tiny(family), tasks=only(tmp_path / "one")), *cut(2, 2), "training.max_steps=2"
    )
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda _, args, given: seen.append((given["hidden_states"][:, :16], given["timestep"])), with_kwargs=True
    )
    latents = next(iter(trainer.get_train_dataloader()))["target_latents"][0].float()
    trainer.train()
    noised, sigma = (torch.cat(parts) for parts in zip(*seen, strict=True))
    sigma = sigma[:, None, None]
    noise = ((noised - (1 - sigma) * latents) / sigma).flatten(1)
    assert len(noise) == 8
    off_diagonal = torch.corrcoef(noise) - torch.eye(8)
    assert off_diagonal.abs().max() < 0.2  # of 1,024 independent values: std 0.03


@both_families
@pytest.mark.parametrize("trainable", [{"modules": [".", "img_in"]}, {"modules": ["attn", "proj_out"]}, LORA])
def test_what_trains_moves_and_what_is_frozen_keeps_its_bits(tiny, tmp_path, family, trainable):
    trainer = trainer_of(write_recipe(tmp_path, tiny(family), trainable=trainable))
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    # the last block's text queries only make text outputs that nothing reads: their gradient is exactly zero
    still = {n for n in trained(trainer) if "blocks.1.attn.add_q_proj" in n or "blocks.1.attn.norm_added_q" in n}
    assert bool(still) == (family == "edit_plus")
    assert moved == trained(trainer) - still


@both_families
def test_low_rate_modules_have_half_the_rate_at_every_step(tiny, tmp_path, family):
    path = write_recipe(tmp_path, tiny(family), trainable={"low_lr_modules": ["img_mlp", "proj_out"]})
    trainer = trainer_of(path, "training.lr_scheduler_type=cosine", "training.warmup_steps=1")
    rates = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            low = {id(p) for n, p in parameters(trainer.model).items() if "img_mlp" in n or n.startswith("proj_out")}
            by_module = {True: set(), False: set()}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    by_module[id(parameter) in low].add(group["lr"])
            rates.append(by_module)

    trainer.add_callback(Watch())
    trainer.train()
    full = [entry["learning_rate"] for entry in steps(trainer)]
    assert len(set(full)) == 4
    assert rates == [{False: {rate}, True: {rate / 2}} for rate in full]


@both_families
def test_the_loss_falls_on_eight_rows(tiny, tmp_path, family):
    """Far below 6, what a model pays that says 0: noise and latents of variance 1, and the latents' mean of 2."""
    write_set(tmp_path / "eight", tiny(family), target_mean=2)
    path = write_recipe(tmp_path, tiny(family), tasks=only(tmp_path / "eight"))
    trainer = run(path, "training.max_steps=30", "training.save_strategy=no", "training.learning_rate=2e-2")
    losses = [entry["loss"] for entry in steps(trainer)]
    assert losses[0] > 6
    assert max(losses[-5:]) < 3


@both_families
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointed_activations_give_the_same_weights(tiny, tmp_path, family, name):
    path = write_recipe(tmp_path, tiny(family), trainable=LORA)
    plain = run(path)
    again = run(path, f"training.output_dir={tmp_path / 'again'}", f"training.{name}=true")
    assert again.model.get_base_model().gradient_checkpointing
    hold(again, plain)


def test_checkpointing_options_that_would_be_ignored_are_refused(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny())
    overrides = (
        "training.activation_checkpointing=true",
        "training.activation_checkpointing_kwargs={every_n_layers: 2}",
    )
    with pytest.raises(InputError, match=r"training.activation_checkpointing_kwargs: got .*every_n_layers"):
        trainer_of(path, *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("report_to=wandbb", "training.report_to: wandbb is not supported, only azure_ml, "),
        ("optim=galore_adamw", "training.optim: .*install.*galore"),
    ],
)
def test_a_tracker_or_an_optimizer_that_cannot_be_used_is_refused(tiny, tmp_path, override, message):
    path = write_recipe(tmp_path, tiny())
    with pytest.raises(InputError, match=message):
        trainer_of(path, "training.optim=sgd", f"training.{override}")


@both_families
def test_bfloat16_arithmetic_comes_near_float32(tiny, tmp_path, family):
    path = write_recipe(tmp_path, tiny(family), trainable=LORA)
    exact = run(path)
    mixed = run(path, f"training.output_dir={tmp_path / 'mixed'}", "training.bf16=true")
    losses = [[entry["loss"] for entry in steps(trainer)] for trainer in (exact, mixed)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # bfloat16 keeps 8 bits: 0.4% a rounding


def test_the_loss_by_task_is_the_mean_over_the_draws_of_the_task(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny(), training={"max_steps": 8, "logging_steps": 4, "save_steps": 4})
    trainer = run(path, *cut(2, 2))
    tasks = [trainer.train_dataset[draw]["task"] for draw in range(32)]
    for entry, part in zip(steps(trainer), (tasks[:16], tasks[16:]), strict=True):
        by_task = {task: part.count(task) for task in set(part)}
        assert {key.removeprefix("loss/") for key in entry if key.startswith("loss/")} == set(by_task)
        mean = sum(entry[f"loss/{task}"] * count for task, count in by_task.items()) / 16
        assert mean == pytest.approx(entry["loss"], rel=1e-5)  # float32 sums on one side
    assert len(set(tasks)) == 2


def test_the_shares_that_were_drawn_are_logged_with_each_loss_and_at_the_end(tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_qie")
    path = write_recipe(tmp_path, tiny(), training={"max_steps": 8, "logging_steps": 4, "save_steps": 4})
    trainer = run(path, *cut(2, 2))
    tasks = [trainer.train_dataset[draw]["task"] for draw in range(32)]
    parts = [("since the last log", part) for part in (tasks[:16], tasks[16:])] + [("by this launch", tasks)]
    for since, part in parts:
        names = {"edit": "edit with 1 source(s)", "text_to_image": "text_to_image with 0 source(s)"}
        shares = [f"{name} {part.count(task) / len(part):.4f}" for task, name in names.items() if task in part]
        assert f"drawn {since}: {', '.join(shares)} of {len(part)} rows" in caplog.text


# --- however it is cut -----------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("trainable", [{}, LORA], ids=["full", "lora"])
def test_the_cut_of_a_step_changes_nothing(tiny, tmp_path, family, trainable):
    """Under SGD: AdamW divides a gradient by its own size, and so blows up the rounding of one that is nearly 0."""
    training = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 6, "save_strategy": "no"}
    path = write_recipe(tmp_path, tiny(family), trainable=trainable, training=training, **SOURCES_0_TO_3)
    for name, grids in (("two", ((2, 4), (4, 4), (4, 2))), ("three", ((4, 4), (2, 2), (4, 6), (2, 2)))):
        write_set(tmp_path / "sets" / name, tiny(family), grids=grids)
    whole, *parts = (run(path, f"training.output_dir={tmp_path / name}", *cut(*c)) for name, c in CUTS.items())
    assert {len(whole.train_dataset[draw]["grids"]) for draw in range(24)} == {1, 2, 3, 4}
    for part in parts:
        hold(part, whole, atol=1e-5)  # float32 sums in another order


# --- wherever it was interrupted -------------------------------------------------------------------------------------


def interrupted(tmp_path: Path, name: str = "interrupted") -> str:
    """The override for a copy of the run as it lay there after step 2."""
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / name / "checkpoint-2")
    return f"training.output_dir={tmp_path / name}"


@both_families
@pytest.mark.parametrize(
    "trainable",
    [{}, {"low_lr_modules": ["attn"]}, {"lora": LORA["lora"] | {"dropout": 0.2}}],
    ids=["full", "two rates", "lora"],
)
def test_a_resumed_run_is_one_that_was_never_interrupted(tiny, tmp_path, family, trainable):
    path = write_recipe(tmp_path, tiny(family), trainable=trainable)
    straight = run(path)
    resumed = run(path, interrupted(tmp_path))
    hold(resumed, straight)
    assert steps(resumed) == steps(straight)  # losses, by task too, norms, rates


def test_a_resumed_run_reads_only_the_rows_it_trains_on(tiny, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, tiny(), trainable=LORA)
    run(path)
    read, get = [], Draws.__getitem__
    monkeypatch.setattr(Draws, "__getitem__", lambda self, draw: read.append(draw) or get(self, draw))
    run(path, interrupted(tmp_path))
    assert read == list(range(8, 16))


@both_families
def test_a_resumed_run_may_be_cut_otherwise_and_go_on_for_longer(tiny, tmp_path, family):
    path = write_recipe(tmp_path, tiny(family), trainable=LORA)
    # other schedules depend on the number of steps; a large epsilon keeps AdamW from blowing up rounding
    same = "training.lr_scheduler_type=constant", "training.adam_epsilon=1e-3"
    run(path, *same, "training.max_steps=2")
    longer = run(path, *same, interrupted(tmp_path), *cut(1, 4))
    shutil.rmtree(tmp_path / "run")
    hold(longer, run(path, *same), atol=1e-5)  # float32 sums in another order


def test_a_resumed_run_logs_and_saves_when_its_recipe_says(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny(), trainable=LORA)
    run(path)
    resumed = run(path, interrupted(tmp_path), "training.save_steps=1")
    assert {f.name for f in Path(resumed.args.output_dir).glob("checkpoint-*")} == {
        f"checkpoint-{n}" for n in (2, 3, 4)
    }


def test_a_run_that_is_past_its_end_is_refused_and_keeps_its_record(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny(), trainable=LORA)
    run(path)
    with pytest.raises(InputError, match=r"^training.max_steps: 2, but .*checkpoint-4 has more steps; raise it"):
        run(path, "training.max_steps=2")


def test_a_finished_run_trains_no_further_and_says_so(tiny, tmp_path, caplog):
    path = write_recipe(tmp_path, tiny(), trainable=LORA)
    finished, again = run(path), run(path)
    assert "checkpoint-4 is the end of this run; raise training.max_steps to train further" in caplog.text
    assert again.state.global_step == 4
    hold(again, finished)


def spoil_nothing_written(folder: Path) -> None:
    (folder / "complete.json").unlink()


def spoil_half_written(folder: Path) -> None:
    text = (folder / "complete.json").read_text()
    (folder / "complete.json").write_text(text[: len(text) // 2])


def spoil_one_bit(folder: Path) -> None:
    data = bytearray((folder / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "optimizer.pt").write_bytes(data)


def spoil_a_file_gone(folder: Path) -> None:
    (folder / "scheduler.pt").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_nothing_written, "it has no complete.json, so saving it was interrupted"),
        (spoil_half_written, "its complete.json cannot be read"),
        (spoil_one_bit, "optimizer.pt has changed since it was written"),
        (spoil_a_file_gone, "scheduler.pt is missing"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over_by_name(tiny, tmp_path, caplog, spoil, reason):
    path = write_recipe(tmp_path, tiny(), trainable=LORA)
    straight = run(path)
    spoil(tmp_path / "run" / "checkpoint-4")
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    assert f"checkpoint-4 is skipped: {reason}" in caplog.text
    hold(run(path), straight)
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


def test_a_folder_without_checkpoints_has_no_last_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_weights_alone_are_no_checkpoint_to_resume_from(tiny, tmp_path, caplog):
    run(write_recipe(tmp_path, tiny(), trainable=LORA), "training.save_only_model=true")
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path / "run") is None
    assert "checkpoint-4 is skipped: it holds weights alone" in caplog.text


def test_samples_of_a_large_file_reach_its_first_and_last_byte(tmp_path, monkeypatch):
    for name, value in (("WHOLE_BYTES", 100), ("SAMPLES", 4), ("SAMPLE_BYTES", 10)):
        monkeypatch.setattr(hf_qie.training.checkpoints, name, value)
    path = tmp_path / "large"
    path.write_bytes(bytes(1000))
    digest = hf_qie.training.checkpoints.file_digest(path)
    seen = []
    for place in range(1000):
        data = bytearray(1000)
        data[place] = 1
        path.write_bytes(data)
        if hf_qie.training.checkpoints.file_digest(path) != digest:
            seen.append(place)
    assert seen == [*range(10), *range(330, 340), *range(660, 670), *range(990, 1000)]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("seed=1", "seed"),
        ("tasks.edit.weight=2", "tasks.edit.weight"),
        ("tasks.edit.weight=0", "tasks.edit.embeddings, tasks.edit.eval_rows, tasks.edit.weight"),
        ("mix.caption_dropout=0.1", "mix.caption_dropout"),
        (
            "mix.same_shape=2 training.per_device_train_batch_size=2 training.gradient_accumulation_steps=2",
            "mix.same_shape",
        ),
        ("loss.weighting=cosmap", "loss.weighting"),
        ("loss.edit_weight=1", "loss.edit_weight"),
        ("trainable.lora.rank=8", "trainable.lora.rank"),
        ("training.gradient_accumulation_steps=2", "global batch"),
    ],
)
def test_a_run_that_would_take_another_course_is_refused_by_field(tiny, tmp_path, change, field):
    path = write_recipe(tmp_path, tiny(), trainable=LORA)
    run(path, "training.max_steps=2")
    with pytest.raises(InputError) as error:
        run(path, *change.split())
    assert f"holds a run with another {field}, which this one cannot resume" in str(error.value)
    assert "set training.output_dir to another folder" in str(error.value)


def test_a_run_on_another_set_is_refused(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny(), trainable=LORA)
    run(path, "training.max_steps=2")
    shutil.rmtree(tmp_path / "sets" / "edit")
    write_set(tmp_path / "sets" / "edit", tiny(), rows=9)
    with pytest.raises(InputError, match=r"another tasks\.edit\.embeddings, which"):
        run(path)


# --- what a checkpoint holds -----------------------------------------------------------------------------------------


@both_families
def test_no_checkpoint_of_a_lora_holds_base_weights(tiny, tmp_path, family):
    trainer = run(write_recipe(tmp_path, tiny(family), trainable=LORA))
    folder = tmp_path / "run" / "checkpoint-4"
    (weights_file,) = folder.rglob("*.safetensors")
    with safe_open(weights_file, framework="pt") as file:
        assert all(".lora_" in key for key in file.keys())  # noqa: SIM118
    adapter_bytes = 4 * sum(p.numel() for n, p in parameters(trainer.model).items() if ".lora_" in n)
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 4 * adapter_bytes  # weights, two moments, the rest


@both_families
def test_a_checkpoint_of_full_weights_loads_in_diffusers(tiny, tmp_path, family):
    trainer = run(write_recipe(tmp_path, tiny(family)))
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "run"):
        loaded = AutoModel.from_pretrained(str(folder), subfolder="transformer")
        assert all(torch.equal(p, weights(trainer)[name]) for name, p in loaded.named_parameters())


def test_complete_json_tells_of_every_file(tiny, tmp_path):
    run(write_recipe(tmp_path, tiny()))
    folder = tmp_path / "run" / "checkpoint-2"
    complete = json.loads((folder / "complete.json").read_text())
    assert (complete["step"], complete["ranks"]) == (2, 1)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    sizes.pop("complete.json")
    assert {name: file["bytes"] for name, file in complete["files"].items()} == sizes


def test_older_checkpoints_go_only_once_the_new_one_is_whole(tiny, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, tiny(), trainable=LORA)
    there, mark = [], hf_qie.training.callbacks.mark_complete

    def watch(folder, **facts):
        there.append(sorted(p.name for p in folder.parent.glob("checkpoint-*")))
        mark(folder, **facts)

    monkeypatch.setattr(hf_qie.training.callbacks, "mark_complete", watch)
    run(path, "training.save_steps=1", "training.save_total_limit=1")
    assert there == [["checkpoint-1"], *([f"checkpoint-{n}", f"checkpoint-{n + 1}"] for n in (1, 2, 3))]
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
