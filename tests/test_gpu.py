"""What `make gpu` will run on a GPU runs here on the CPU in small shapes, and says what it should.

The figures are not looked at: they are of another device. Each step is called as its process calls it; that processes
end, fail and are killed as they should is tested with a few of them.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from gpu import devices, encoding, run
from gpu.cases import Case, Context, checkpoint, recipe_of, set_of
from gpu.devices import Kernel, Trace, traced, waits_counted
from gpu.page import END, NONE_YET, START, fill
from gpu.processes import Worker, imported
from gpu.results import FAILED, Result, as_json, from_json, markdown, read_lines, table
from gpu.run import parse
from gpu.steps import STEPS, Step
from gpu.weights import random_encoders, random_transformers, random_values
from released import ENCODER, NUM_ENCODER_PARAMETERS, WIDTH

from hf_qie.data.collate import collate
from hf_qie.data.loader import TaskRows
from hf_qie.extraction.memory import forecast
from hf_qie.extraction.plan import family_of_recipe, make_plan
from hf_qie.extraction.run import CUDNN_LAST
from hf_qie.models.base import families, read_family
from hf_qie.training.model import build_model, parameters

CPU = torch.device("cpu")
TRAINING = {"samples/s", "seconds a sample", "seconds a step", "operations of the model", "peak memory of tensors"}
TRAINING |= {"of steps waiting for data", "memory reserved by the allocator"}
BY_NAME = {step.name: step for step in STEPS}
DAILY = ("train-512", "train21-512-x4", "train-stream")  # of all that train
TRAINED = [
    pytest.param(step.name, marks=() if step.name in DAILY else pytest.mark.soak)
    for step in STEPS
    if step.function == "gpu.training:measure"
]


@pytest.fixture
def measured(tmp_path):
    """`measured(name, earlier)` -> the results of a step in small shapes."""

    def measure(name: str, earlier=()) -> list[Result]:
        PartialState(cpu=True)
        (tmp_path / "step").mkdir()
        function, context, arguments = imported(BY_NAME[name], tmp_path / "step", True)
        return list(function(replace(context, device=CPU, earlier=earlier), step=name, **arguments))

    return measure


def values(results: list[Result]) -> dict[str, float]:
    return {result.what: result.value for result in results}


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_of_training_gives_its_figures(measured, name):
    count = BY_NAME[name].case.get("draws_per_row", 1)
    one = name.replace(f"-x{count}", "-x1")
    earlier = [Result(step="train-512", what="seconds a step", value=2.0)]
    earlier += [Result(step=one, what="seconds a sample", value=2.0)] if one != name else []
    results = measured(name, earlier)
    found = values(results)
    assert found.keys() == TRAINING and all(value > 0 for value in found.values())
    assert found["samples/s"] * found["seconds a sample"] == pytest.approx(1)
    assert found["seconds a step"] == pytest.approx(count * found["seconds a sample"])
    by_name = {result.what: result for result in results}
    step, forecast = by_name["seconds a step"], by_name["peak memory of tensors"]
    settings = BY_NAME[name].settings
    assert step.other > 0 if settings.get("bare") else step.other == (2.0 if settings else None)
    assert forecast.beside == "the forecast" and 1e-4 < forecast.other < 0.02  # GB, of some 400,000 parameters
    assert by_name["seconds a sample"].other == (2.0 if one != name else None)


def test_the_tiny_flow_is_the_same_twice_and_on_the_cpu(measured):
    results = measured("tiny")
    assert [result.value for result in results] == [0, 0, 0, 0, 0]  # all are the CPU
    assert all(result.met for result in results)


def test_extraction_and_the_passes_of_the_pipeline_are_timed(measured):
    found = {result.what: result for result in measured("encode")}
    assert found["1 source: rows/s of extraction"].value > 0
    assert "attention" in found["1 source: kernels of attention, usual"].value
    assert found["1 source: the encoder, prompts of a row"].ratio < 1  # three passes of the image against one
    assert found["1 source: rows/s of extraction"].other is None


@pytest.mark.soak
def test_extraction_with_torchs_own_order_of_kernels_stands_beside_the_other(measured, monkeypatch):
    monkeypatch.delenv(CUDNN_LAST, raising=False)
    rows = "1 source: rows/s of extraction"
    found = {result.what: result for result in measured("encode-cudnn", [Result(step="encode", what=rows, value=2.0)])}
    assert found[rows].other == 2.0 and os.environ[CUDNN_LAST] == "0"


def test_the_profile_names_kernels_and_counts_no_wait_on_a_cpu(measured):
    results = measured("profile")
    found = values(results)
    assert found["waits of the host a step"] == 0 and found["kernels a step"] > 100
    shares = [result.value for result in results if result.what.startswith("of kernels' time")]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True)


@pytest.mark.soak  # tests/test_fsdp.py and tests/test_faults.py hold the same every day
@pytest.mark.two_rank
def test_shards_are_saved_resumed_and_survive_a_killed_rank(measured):
    found = values(measured("sharded"))
    assert found["full steps, save: ranks that ended well"] == 2
    assert found["losses of the resumed run apart from one without a break"] == 0


# --- processes ---


def failing(context: Context, *, step: str):
    yield Result(step=step, what="before", value=1.0)
    raise ValueError("no such kernel")


def hanging(context: Context, *, step: str):
    yield Result(step=step, what="before", value=1.0)
    time.sleep(600)


def dying(context: Context, *, step: str):
    yield Result(step=step, what="device", value=str(context.device))
    import os

    os.abort()


def fine(context: Context, *, step: str):
    yield Result(step=step, what="earlier", value=float(len(context.earlier)))


def test_steps_that_fail_hang_or_die_leave_what_they_found_and_the_next_one_runs(tmp_path, monkeypatch):
    names = ("failing", "hanging", "dying", "fine")
    steps = [Step(name=name, limit_s=60, what=name, function=f"test_gpu:{name}") for name in names]
    given = parse(["--json", str(tmp_path / "gpu.json"), "--small"])
    steps[1] = replace(steps[1], limit_s=4)
    monkeypatch.setattr(run, "LEAST_S", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which it leaves like this
    run.run_steps(steps, given, {"device": "cpu", "count": 1})
    report = json.loads((tmp_path / "gpu.json").read_text())
    found = [(one["step"], one["what"]) for one in report["results"]]
    assert found == [
        *(("failing", "before"), ("failing", FAILED), ("hanging", "before"), ("hanging", FAILED)),
        *(("dying", "device"), ("dying", FAILED), ("fine", "earlier")),
    ]
    failed = [one["value"] for one in report["results"] if one["what"] == FAILED]
    assert failed[0].startswith("exit code 1; ValueError: no such kernel")
    assert failed[1].startswith("no end within 4 s") and failed[2].startswith("exit code -6")
    assert report["results"][-1]["value"] == 6 and report["seconds"]["hanging"] < 20


def test_no_step_begins_when_the_time_is_over(tmp_path, monkeypatch):
    steps = [Step(name=name, limit_s=60, what="", function="test_gpu:fine") for name in ("one", "other")]
    given = parse(["--json", str(tmp_path / "gpu.json"), "--small", "--minutes", "0"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    results = run.run_steps(steps, given, {"device": "cpu", "count": 1})
    assert [(one.step, one.value) for one in results] == [
        ("one", "not begun: 0 minutes are over"),
        ("other", "not begun: 0 minutes are over"),
    ]


def test_a_process_that_waits_for_its_turn_can_be_ended(tmp_path):
    worker = Worker(Step(name="fine", limit_s=1, what="", function="test_gpu:fine"), tmp_path, small=True)
    worker.stop()
    assert not worker.process.is_alive() and not read_lines(worker.lines)


def test_the_whole_command_writes_a_table_and_a_file_and_fills_the_page(root, tmp_path):
    report, page = tmp_path / "gpu.json", tmp_path / "performance.md"
    script = [sys.executable, str(root / "tests" / "gpu" / "run.py")]
    done = subprocess.run(
        [*script, "--small", "--steps", "train21-512-x4", "--json", str(report)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = [from_json(one) for one in json.loads(report.read_text())["results"]]
    assert {one.step for one in results} == {"train21-512-x4"} and table(results) in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"gpu", "gpu.json"}
    assert list((tmp_path / "gpu" / "work").iterdir()) == []
    shutil.copyfile(root / "docs" / "performance.md", page)
    subprocess.run([*script, "--page", str(report), "--into", str(page)], check=True)
    assert markdown(results) in page.read_text()


def test_without_a_gpu_the_command_says_so(root, tmp_path):
    script = root / "tests" / "gpu" / "run.py"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, script], env=hidden, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("make gpu: torch finds no GPU on this machine\n")
    assert list(tmp_path.iterdir()) == []


def test_the_steps_fit_into_ten_minutes_as_far_as_they_go_as_planned():
    assert sum(step.limit_s for step in STEPS[:5]) <= 400  # what matters most runs even where each takes its limit
    assert [step.name for step in STEPS][:4] == ["tiny", "train-512", "train-1024", "encode"]
    assert parse(["--steps", "encode,tiny"]).steps == ["tiny", "encode"]
    with pytest.raises(SystemExit):
        parse(["--steps", "train"])


# --- what figures are made of ---


def test_a_result_is_judged_by_its_ratio_or_else_by_itself():
    of = {"step": "a", "what": "b"}
    assert [Result(**of, value=value, other=1.0, most=1.05).met for value in (1.04, 1.06)] == [True, False]
    near = {"other": 10.0, "least": 0.9, "most": 1.1}
    assert [Result(**of, value=value, **near).met for value in (8.9, 9.1, 11.1)] == [False, True, False]
    assert Result(**of, value=0.03, most=0.02).met is False and Result(**of, value=1.0).met is None
    assert Result(step="a", what=FAILED, value="x").met is False
    one = Result(**of, value=3.0, unit="s", beside="c", other=2.0)
    assert from_json(as_json(one)) == one and as_json(one)["ratio"] == 1.5


def test_names_of_kernels_are_no_tags_on_the_page():
    found = markdown([Result(step="a", what="gemm<half, 4>(a | b)", value=1.0, most=2)])
    assert "| gemm&lt;half, 4>(a / b) |" in found and "| <= 2 |" in found


def test_a_line_that_is_cut_off_is_left_out(tmp_path):
    whole = json.dumps(as_json(Result(step="a", what="b", value=1.0)))
    (tmp_path / "a.jsonl").write_text(f"{whole}\n{whole[:20]}")
    assert values(read_lines(tmp_path / "a.jsonl")) == {"b": 1.0}


def test_kernels_that_overlap_are_counted_once():
    trace = Trace([Kernel("flash_fwd", 0, 40), Kernel("gemm", 10, 20), Kernel("gemm", 90, 100), Kernel("x", 30, 50)])
    assert trace.busy_share == pytest.approx(0.6) and trace.span_s == pytest.approx(1e-7)
    assert trace.longest(2) == [("flash_fwd", 0.5, 1), ("gemm", 0.25, 2)] and trace.attention == ["flash_fwd"]
    assert Trace().busy_share == Trace().span_s == 0.0


def test_a_trace_has_what_ran_within_it():
    one = torch.ones(8, 8)
    with traced(CPU) as trace:
        one @ one
    assert "aten::mm" in {kernel.name for kernel in trace.kernels}


def test_waits_are_counted_by_place_and_other_warnings_are_passed_on(capsys):
    with waits_counted(CPU) as waits:
        for _ in range(3):
            warnings.warn(f"{devices.WAITS} (Triggered internally at x.cpp:1.)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    ((place, count),) = waits.items()
    assert count == 3 and place.startswith("tests/test_gpu.py:")
    assert "something else" in capsys.readouterr().err


@pytest.mark.parametrize("pipeline", ["QwenImageEditPlusPipeline", "QwenImage21Pipeline"])
def test_a_random_transformer_is_the_checkpoints_with_finite_values(tmp_path, pipeline):
    context = Context(folder=tmp_path, device=CPU, small=True)
    recipe = recipe_of(Case(pipeline=pipeline), context, max_steps=1)
    was = type(read_family(recipe.model)).load_transformer
    with random_transformers(CPU):
        model, empty = build_model(recipe, mixed_precision="bf16"), build_model(recipe, empty=True)
    assert type(read_family(recipe.model)).load_transformer is was
    found = parameters(model)
    assert {name: one.shape for name, one in found.items()} == {n: one.shape for n, one in parameters(empty).items()}
    assert {one.dtype for name, one in found.items() if ".lora_" not in name} == {torch.bfloat16}
    assert all(one.isfinite().all() and one.abs().max() < 10 for one in found.values())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_a_random_matrix_halves_what_flows_through_it():
    weight = random_values(torch.empty(512, 2048, device="meta"), CPU)
    assert (torch.randn(64, 2048) @ weight.T).std() == pytest.approx(0.5, rel=0.05)


def test_the_released_configs_are_those_of_20_and_of_7_billion(tmp_path):
    for family in families():
        if family.pipeline in ("QwenImageEditPlusPipeline", "QwenImage21Pipeline"):
            model = checkpoint(tmp_path / family.pipeline, family.pipeline, small=False)
            empty = family.load_transformer(str(model), revision=None, dtype=torch.bfloat16, empty=True)
            billions = sum(one.numel() for one in empty.parameters()) / 1e9
            assert math.isclose(billions, {"QwenImage21Pipeline": 7.1}.get(family.pipeline, 20.43), rel_tol=0.02)


@pytest.mark.parametrize(("pipeline", "draws"), [("QwenImageEditPlusPipeline", 1), ("QwenImage21Pipeline", 4)])
def test_rows_of_released_shape_train_the_released_model_on_paper(tmp_path, pipeline, draws):
    """On the meta device in float32, as nothing is cast there."""
    case = Case(pipeline=pipeline, draws_per_row=draws, training={"bf16": False})
    recipe, meta = recipe_of(case, Context(folder=tmp_path, device=CPU), max_steps=2), torch.device("meta")
    family = read_family(recipe.model)
    rows = TaskRows("edit", set_of(case, recipe, small=False), mix=recipe.mix, family=family)
    batch = collate([rows.read(0, inverse=False, caption=0.5) | {"draws": list(range(draws))}])
    with random_transformers(meta):
        model = build_model(recipe)
    assert batch["prompt_lengths"] == [case.num_tokens] and len(batch["draw"]) == draws
    assert batch["grids"] == list(case.shape(small=False).grids) == [(32, 32), (64, 64)]
    batch |= {name: value.to(meta) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    noised, sigma = torch.empty(draws, 1024, 64, device=meta), torch.empty(draws, device=meta)
    family.predict(model, batch, noised, sigma).sum().backward()
    assert any(one.requires_grad for one in model.parameters())
    assert all(one.is_meta and (one.grad is not None) == one.requires_grad for one in model.parameters())


def test_rows_are_extracted_by_the_released_encoder_on_paper(tmp_path):
    model = encoding.checkpoint(tmp_path / "model", small=False)
    recipe = encoding.recipe_of(tmp_path / "rows", model, 3, Context(folder=tmp_path, device=CPU))
    (tmp_path / "plan").mkdir()
    plan = make_plan(recipe, recipe.tasks["edit"], family_of_recipe(recipe), tmp_path / "plan")
    assert len(plan.rows.table) == encoding.ROWS[3]
    processor = plan.family.load_processor(recipe.model, revision=None)
    (prompt, *_) = encoding.prompts_of(plan.family, processor, tmp_path / "rows", 3, 4)
    assert [len(branch) for branch in prompt.branches] == [55, 55, 6] and len(prompt.shared) == 64 + 3 * 203
    expected = forecast({"edit": plan}, processor, dtype=torch.bfloat16)
    head = ENCODER["text_config"]["vocab_size"] * WIDTH
    assert expected.encoder_weights == pytest.approx(2 * (NUM_ENCODER_PARAMETERS - head), rel=1e-3)
    assert 2e8 < expected.vae_weights < 3e8  # 127 million parameters


def test_the_page_has_no_figures_until_there_are_some(root):
    page = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page.count(START) == page.count(END) == 1
    _, _, rest = page.partition(START)
    assert rest.partition(END)[0] == NONE_YET or "| step | what | measured |" in rest


def test_a_made_up_report_fills_the_page_again_and_again(root):
    page = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    against = {"beside": "a loop", "other": 0.78, "most": 1.05}
    result = Result(step="train-512", what="seconds a step", value=0.8, unit="s", **against)
    machine = {"device": "NVIDIA H100", "count": 1, "memory_gb": 85.0, "when": "2026-12-01", "commit": "0123456789ab"}
    report = {"machine": machine | {"versions": {"torch": "2.14.1"}}, "seconds": {"train-512": 41.2}}
    report["results"] = [as_json(result)]
    once = fill(page, report)
    assert "| train-512 | seconds a step | 0.8 s | a loop | 0.78 s | 1.03 | <= 1.05 | yes |\n" in once
    assert "1 x NVIDIA H100 of 85 GB, commit 012345678; torch 2.14.1; 41 s in all." in once
    assert NONE_YET not in once and fill(once, report) == once
    before, after = page.split(START)[0], page.split(END)[1]
    assert once.startswith(before) and once.endswith(after)


def test_encoders_of_a_config_alone_are_made_and_the_classes_are_as_before(tiny, tmp_path):
    from hf_qie.models.prompt_encoder import PromptEncoder

    was = PromptEncoder.load
    with random_encoders(CPU) as made:
        family = read_family(str(tiny()))
        encoder = family.load_encoder(str(tiny()), revision=None, dtype=torch.float32, device=CPU)
        assert encoder.model is made["full"].model
    assert PromptEncoder.load is was
