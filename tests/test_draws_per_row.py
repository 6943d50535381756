"""Several noises of a row in one pass are as many passes, however a step is cut, alone, under DDP and sharded."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from embedding_sets import write_recipe
from ranks import in_ranks
from safetensors.torch import load_file
from training_runs import run, trainer_of

import hf_qie.training.setup
from hf_qie import export
from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.training.checkpoints import read_complete
from hf_qie.training.fit import forecast_recipe
from hf_qie.training.model import LORA_FILE, base_of, parameters
from hf_qie.training.objective import noise_for, sigmas_for
from hf_qie.training.sets import open_sets
from hf_qie.training.trainer import EditTrainer

LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}}
KINDS = {"full": {}, "lora": LORA}
WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": LORA_FILE}
MIX = {"draws_per_row": 4, "same_shape": 2, "caption_dropout": 0.3}
# SGD: AdamW divides a gradient by its own size, and so blows up the rounding of one that is nearly 0
SGD = {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 8}
CUTS = {"8x1": (8, 1), "4x2": (4, 2)}  # draws x accumulation


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


def recipe_of(folder: Path, model: Path, kind: str = "full", **sections) -> Path:
    """Also with what weighs positions, which belongs to a row and not to a draw."""
    sections = {"trainable": KINDS[kind], "mix": MIX, "loss": {"edit_weight": 1.0}, "training": SGD} | sections
    return write_recipe(folder, model, **sections)


def cut(draws: int, accumulation: int) -> list[str]:
    sizes = f"training.per_device_train_batch_size={draws}", f"training.gradient_accumulation_steps={accumulation}"
    return list(sizes)


def in_float64(model: torch.nn.Module, monkeypatch) -> None:
    """All of it, without the casts to float32 of diffusers and of ours, which alone leave 1e-8."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for block in base_of(model).transformer_blocks:
        for name in ("norm_q", "norm_k"):
            old = getattr(block.attn, name)
            norm = torch.nn.RMSNorm(len(old.weight), eps=old.eps)
            norm.weight = old.weight
            setattr(block.attn, name, norm)
    model.double()


def one_draw(batch: dict, place: int) -> dict:
    """The batch of one draw of one of its rows."""
    row, of_draw = place // MIX["draws_per_row"], ("draw", "noise", "sigma")
    places = {key: place if key in of_draw else row for key in batch if key != "grids"}
    return {key: batch[key][at : at + 1] for key, at in places.items()} | {"grids": batch["grids"]}


def losses_and_gradients(trainer: EditTrainer, batches: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    losses = torch.cat([trainer.objective.losses(trainer.model, batch) for batch in batches])
    trainer.model.zero_grad()
    losses.mean().backward()
    return losses.detach(), {n: p.grad for n, p in parameters(trainer.model).items() if p.requires_grad}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_draws_of_a_row_in_one_pass_are_as_many_passes(
    tiny, tmp_path, monkeypatch, dtype, tolerance, kind, checkpointing
):
    """Loss of each draw and gradient of every parameter, of rows with prompts of unequal length."""
    recipe = recipe_of(tmp_path, tiny("qwen_image_21"), kind)
    trainer = trainer_of(recipe, f"training.activation_checkpointing={checkpointing}")
    if kind == "lora":  # what an adapter adds is zero at first, and so are gradients of one of its halves
        torch.manual_seed(0)
        for name, parameter in parameters(trainer.model).items():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    if dtype == torch.float64:
        in_float64(trainer.model, monkeypatch)
    batch = next(one for one in trainer.get_train_dataloader() if len(one["grids"]) > 1)
    assert len(set(batch["prompt_lengths"])) > 1
    apart = [one_draw(batch, place) for place in range(8)]
    (losses, gradients), (expected, wanted) = (losses_and_gradients(trainer, given) for given in ([batch], apart))
    assert losses.dtype == dtype
    assert len(set(losses.tolist())) == 8
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert relative(gradients[name], gradient) < tolerance, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_of_a_step_changes_nothing(tiny, tmp_path, kind):
    path = recipe_of(tmp_path, tiny("qwen_image_21"), kind)
    whole, part = (run(path, f"training.output_dir={tmp_path / name}", *cut(*CUTS[name])) for name in CUTS)
    ours, theirs = (parameters(trainer.model) for trainer in (part, whole))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0)  # float32 sums in another order
    for one, other in zip(part.state.log_history, whole.state.log_history, strict=True):
        by_task = {key: value for key, value in one.items() if key.startswith("loss")}
        assert by_task == pytest.approx({key: other[key] for key in by_task}, rel=1e-5)


def test_noise_and_level_of_a_draw_are_those_of_its_number(tiny, tmp_path):
    """As in a run with one draw a row, and no two alike."""
    seen = {}
    for count in (1, 4):
        path = recipe_of(tmp_path, tiny("qwen_image_21"), mix={"draws_per_row": count, "same_shape": 8 // count})
        trainer = trainer_of(path, "loss.timestep_sampling=stratified")
        batch = next(iter(trainer.get_train_dataloader()))
        zero = batch | {"target_latents": torch.zeros_like(batch["target_latents"])}
        given = {}
        hook = trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs, g=given: g.update(kwargs), with_kwargs=True
        )
        trainer.objective.losses(trainer.model, zero)
        hook.remove()
        sigma = given["timestep"]
        seen[count] = sigma, given["hidden_states"] / sigma[:, None, None]
        numbers, objective = list(range(8)), trainer.objective
        of_step = {"loss": objective.loss, "seed": 0, "global_batch_size": 8}
        assert batch["draw"] == numbers
        assert torch.equal(sigma, sigmas_for(numbers, **of_step, mu=objective.mu(zero["target_latents"].shape[1])))
        assert torch.equal(batch["noise"], noise_for(numbers, zero["target_latents"].shape[1:], seed=0))
    assert len(set(seen[4][0].tolist())) == 8
    assert torch.equal(seen[4][0], seen[1][0])
    torch.testing.assert_close(seen[4][1], seen[1][1], atol=1e-5, rtol=0)
    assert (torch.corrcoef(seen[4][1].flatten(1)) - torch.eye(8)).abs().max() < 0.2


def test_epochs_count_rows_and_not_their_draws(tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_qie")
    training = SGD | {"max_steps": None, "num_train_epochs": 2}
    trainer = run(recipe_of(tmp_path, tiny("qwen_image_21"), training=training))
    assert trainer.state.global_step == 2 * 16 * 4 / 8
    assert "32 rows drawn, 4 noises each" in caplog.text
    assert "2 rows a step: 1 ranks x 2 rows x 1 accumulated, 4 noises each; 16 steps" in caplog.text
    assert "of 2 rows" in caplog.text  # since the last log
    assert "of 32 rows" in caplog.text  # in all
    assert sum(trainer.losses.drawn_in_all.values()) == 32
    assert (trainer.record["rows_a_rank"], trainer.record["draws_per_row"]) == (2, 4)
    export.main([str(tmp_path / "run"), "--output", str(tmp_path / "exported")])
    assert "16 steps of 2 rows, 4 noises each\n" in (tmp_path / "exported" / "README.md").read_text()


def test_the_loss_by_task_and_the_throughput_count_draws(tiny, tmp_path):
    path = recipe_of(tmp_path, tiny("qwen_image_21"), training=SGD | {"logging_steps": 4, "save_steps": 4})
    trainer = run(path, *cut(4, 2))
    first, *_ = [entry for entry in trainer.state.log_history if "loss" in entry]
    rows = [trainer.train_dataset[draw] for draw in range(0, 32, 4)]
    by_task = {task: sum(row["task"] == task for row in rows) for task in ("edit", "text_to_image")}
    mean = sum(first[f"loss/{task}"] * count for task, count in by_task.items() if count) / 8
    assert mean == pytest.approx(first["loss"], rel=1e-5)
    tokens = sum(
        4 * len(row["target_latents"]) + len(row["source_latents"]) + sum(map(len, row["prompt_parts"]))
        for row in rows
    )
    assert first["tokens_per_second"] / first["rows_per_second"] == pytest.approx(tokens / 32)


# --- resuming, and what is refused -----------------------------------------------------------------------------------


def test_a_resumed_run_is_one_that_was_never_interrupted(tiny, tmp_path):
    path = recipe_of(tmp_path, tiny("qwen_image_21"), "lora")
    straight = run(path)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed = run(path, f"training.output_dir={tmp_path / 'again'}")
    for name, value in parameters(straight.model).items():
        assert torch.equal(parameters(resumed.model)[name], value), name


def test_another_number_of_draws_is_another_run(tiny, tmp_path):
    path = recipe_of(tmp_path, tiny("qwen_image_21"), "lora")
    run(path, "training.max_steps=2")
    message = r"another mix.draws_per_row, mix.same_shape, which.*\(mix.draws_per_row was 4, is 1; "
    with pytest.raises(InputError, match=message):
        run(path, "mix.draws_per_row=1", "mix.same_shape=8")


def test_a_checkpoint_of_before_there_was_a_choice_had_one_draw_a_row(tiny, tmp_path):
    path = recipe_of(tmp_path, tiny("qwen_image_21"), "lora", mix={"same_shape": 8})
    run(path, "training.max_steps=2")
    file = tmp_path / "run" / "checkpoint-2" / "complete.json"
    complete = json.loads(file.read_text())
    assert complete["identity"].pop("mix.draws_per_row") == 1
    file.write_text(json.dumps(complete))
    assert "mix.draws_per_row" not in read_complete(file.parent)["identity"]
    with pytest.raises(InputError, match=r"\(mix.draws_per_row was 1, is 2; "):
        run(path, "mix.draws_per_row=2", "mix.same_shape=4")
    assert run(path, "training.max_steps=3").state.global_step == 3


@pytest.mark.parametrize("kind", ["edit_plus", "qwen_image_21_no_causal_condition"])
def test_a_prefix_that_depends_on_the_noise_is_refused_before_a_model_is_loaded(tiny, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(hf_qie.training.setup, "build_model", lambda *_, **__: pytest.fail("a model is loaded"))
    recipe = load_recipe(recipe_of(tmp_path, tiny(kind)))
    for check in (open_sets, lambda recipe: forecast_recipe(recipe, None)):
        with pytest.raises(
            InputError, match=r"^mix.draws_per_row: 4, but what the transformer of .* depends on the no"
        ):
            check(recipe)


def test_evaluation_and_images_have_one_noise_a_row(tiny, tmp_path):
    """Losses of held-out rows are those of a run with one draw a row."""
    tasks = {"edit": {"data": "edit.jsonl", "eval_rows": 3}}
    evaluated = []
    for mix in (MIX, {"same_shape": 8}):
        path = recipe_of(tmp_path, tiny("qwen_image_21"), "lora", tasks=tasks, mix=mix)
        evaluated.append(trainer_of(path, "training.eval_strategy=steps").evaluate()["eval_loss"])
    assert evaluated[0] == evaluated[1]


# --- several ranks ---------------------------------------------------------------------------------------------------


def fsdp(state: str) -> list[str]:
    config = f"{{fsdp_version: 2, state_dict_type: {state}_STATE_DICT, cpu_ram_efficient_loading: true}}"
    return ["training.fsdp=true", f"training.fsdp_config={config}"]


@pytest.mark.two_rank
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_sharded_or_not_train_what_one_does(tiny, tmp_path, kind):
    """The second rank is sent its weights, and makes what no checkpoint holds itself."""
    model = tiny("qwen_image_21")
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    path = recipe_of(tmp_path, model, kind, training=SGD | {"use_cpu": None})
    checkpointed = "training.activation_checkpointing=true"
    ways = {"ddp": ["training.use_cpu=true"], "ddp_checkpointed": ["training.use_cpu=true", checkpointed]}
    ways |= {state: fsdp(state) for state in ("SHARDED", "FULL")}
    ways["FULL"].append(checkpointed)
    runs = []
    for name, overrides in ways.items():
        folder = f"training.output_dir={tmp_path / name}"
        others = [f"model={tmp_path / 'bare'}"] if not name.startswith("ddp") else []
        runs.append({"recipe": str(path), "overrides": [folder, *cut(4, 1), *overrides], "others": others})
    resumed = {"checkpoint": str(tmp_path / "SHARDED" / "checkpoint-2")}
    resumed["overrides"] = [f"training.output_dir={tmp_path / 'resumed'}", *cut(4, 1), *ways["SHARDED"]]
    runs.append({"recipe": str(path)} | resumed)
    assert in_ranks(runs, ranks=2, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    run(path, "training.use_cpu=true", f"training.output_dir={tmp_path / 'alone'}")
    alone = load_file(tmp_path / "alone" / WEIGHTS[kind])
    for name in (*ways, "resumed"):
        found = load_file(tmp_path / name / WEIGHTS[kind])
        assert found.keys() == alone.keys()
        for key, value in alone.items():  # float32 sums in another order
            assert (found[key] - value).abs().max() < 1e-5, f"{name}: {key}"
