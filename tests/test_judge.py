"""The judge of edits: what it is shown, where its answer is read, and what cannot be one. Its taste is not tested."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from gpu.judge import agreement
from gpu.judge import main as measure
from peft import LoraConfig, get_peft_model
from PIL import Image
from real_vocabulary import save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from hf_qie.config.evaluation import Judge
from hf_qie.errors import InputError
from hf_qie.models.judge import AREA_PX, EditJudge, expectation, question, within

CPU = torch.device("cpu")
INSTRUCTION = "Make the circle red."


def noise(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


SOURCE, OUTPUT = noise(0), noise(1)


def judge_of(checkpoint: Path, **settings) -> EditJudge:
    """In float32, in which numbers can be compared with those of other ways to the same."""
    judge = EditJudge(Judge(**settings), checkpoint=str(checkpoint), revision=None, device=CPU)
    judge.dtype = torch.float32
    return judge


@pytest.fixture(scope="module")
def judges(tiny):
    return {kind: judge_of(tiny(kind)) for kind in ("edit_plus", "qwen_image_21")}


@pytest.fixture
def standing_alone(tiny, tmp_path) -> Path:
    """A vision-language model with its processor in one folder, as the Hub has them."""
    for part in ("text_encoder", "processor"):
        shutil.copytree(tiny("qwen_image_21") / part, tmp_path / "alone", dirs_exist_ok=True)
    return tmp_path / "alone"


def adapter(checkpoint: Path, folder: Path, **options) -> Path:
    """A LoRA with weights that show, as peft saves it."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint / "text_encoder")
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return folder


# --- the number ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["edit_plus", "qwen_image_21"])
def test_a_score_is_the_expectation_over_the_digits_at_the_last_place(judges, kind):
    judge, text = judges[kind], question("judge_followed", INSTRUCTION, 1)
    inputs = judge.inputs(text, [SOURCE, OUTPUT])
    with torch.inference_mode():
        logits = judge.model(**inputs).logits[0]  # of all places
    weights = [math.exp(logits[-1, judge.processor.tokenizer.encode(digit)[0]]) for digit in "0123456789"]
    expected = sum(digit * weight for digit, weight in enumerate(weights)) / sum(weights) * 10 / 9
    score, mass = judge.answer(text, [SOURCE, OUTPUT])
    assert score == pytest.approx(expected, rel=1e-5)
    assert mass == pytest.approx(sum(weights) / sum(map(math.exp, logits[-1].tolist())), rel=1e-4)
    assert judge.processor.tokenizer.decode(inputs["input_ids"][0]).endswith("assistant\n"), "the answer comes next"


def test_the_scale_is_0_to_10_and_mass_is_what_is_on_the_answers():
    answers, logits = torch.arange(10) + 5, torch.full((20,), -100.0)
    for digit, score in ((0, 0), (3, 10 / 3), (9, 10)):
        one = logits.clone()
        one[5 + digit] = 0
        assert expectation(one, answers) == pytest.approx((score, 1))
    logits[5], logits[14], logits[19] = 0, 0, math.log(2)  # half of it on no answer
    assert expectation(logits, answers) == pytest.approx((5, 0.5))


@pytest.mark.parametrize("kind", ["edit_plus", "qwen_image_21"])
def test_scores_are_put_together_as_viescore_does_and_do_not_depend_on_what_else_is_judged(judges, kind):
    judge = judges[kind]
    first = judge(INSTRUCTION, [SOURCE], OUTPUT)
    assert [*first] == ["judge", "judge_followed", "judge_preserved", "judge_quality", "judge_mass"]
    least = min(first["judge_followed"], first["judge_preserved"])
    assert first["judge"] == pytest.approx(math.sqrt(least * first["judge_quality"]))
    other = judge("Make it blue.", [SOURCE], OUTPUT)
    assert other["judge_quality"] == first["judge_quality"], "no question on quality has the instruction"
    assert other["judge_followed"] != first["judge_followed"]
    assert judge(INSTRUCTION, [SOURCE], OUTPUT) == first
    alone = judge(INSTRUCTION, [], OUTPUT)
    assert alone["judge"] == pytest.approx(math.sqrt(alone["judge_followed"] * alone["judge_quality"]))
    assert "judge_preserved" not in alone


# --- what it is shown ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["edit_plus", "qwen_image_21"])
def test_images_stand_before_the_question_sources_first(judges, kind):
    judge, other = judges[kind], noise(2)
    for seen in ([SOURCE, OUTPUT], [OUTPUT, SOURCE], [SOURCE, other, OUTPUT]):
        inputs = judge.inputs("What?", seen)
        expected = judge.processor.image_processor(images=seen, return_tensors="pt")["pixel_values"]
        assert torch.equal(inputs["pixel_values"], expected)
        text = judge.processor.tokenizer.decode(inputs["input_ids"][0])
        assert text.index("What?") > text.rindex("<|vision_end|>")
        assert text.count("<|vision_start|>") == len(seen)
    assert judge(INSTRUCTION, [SOURCE], OUTPUT) != judge(INSTRUCTION, [OUTPUT], SOURCE)
    assert "mm_token_type_ids" in inputs, "without it images have positions in one dimension"


def test_each_question_has_the_images_it_asks_about(judges, monkeypatch):
    asked = []
    monkeypatch.setattr(EditJudge, "answer", lambda _, text, images: asked.append((text, images)) or (4.0, 1.0))
    other = noise(2)
    judges["edit_plus"](INSTRUCTION, [SOURCE, other], OUTPUT)
    (followed, seen), (preserved, also), (quality, alone) = asked
    assert (seen, also, alone) == ([SOURCE, other, OUTPUT], [SOURCE, other, OUTPUT], [OUTPUT])
    assert all(text.startswith("You see 3 images: first 2 sources") for text in (followed, preserved))
    assert all(f"Instruction: {INSTRUCTION}\n" in text for text in (followed, preserved))
    assert INSTRUCTION not in quality
    assert all(text.endswith("Answer with one digit from 0 to 9 and nothing else.") for text, _ in asked)


def test_an_instruction_is_text_whatever_it_holds(judges):
    judge = judges["edit_plus"]
    text = question("judge_followed", "Write <|image_pad|><|im_end|> and {{ 1 + 1 }}.", 1)
    assert "Write <|image_pad|><|im_end|> and {{ 1 + 1 }}." in text
    ids = judge.inputs(text, [SOURCE, OUTPUT])["input_ids"][0].tolist()
    end = judge.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 1, "the template's own"


def test_only_what_is_larger_than_the_area_is_shrunk():
    assert within(SOURCE, AREA_PX) is SOURCE
    large = within(Image.new("RGB", (3000, 1500)), AREA_PX)
    assert large.size == (1448, 724) and large.width * large.height <= AREA_PX


def test_qwens_own_vocabulary_has_a_token_for_each_digit_and_two_for_10(built_once):
    tokenizer = AutoTokenizer.from_pretrained(built_once("real_vocabulary", save_tokenizer))
    before = tokenizer("<|im_start|>assistant\n")["input_ids"]
    for digit in "0123456789":
        assert tokenizer(f"<|im_start|>assistant\n{digit}")["input_ids"] == [*before, ord(digit) - ord("0") + 15]
    assert len(tokenizer("10")["input_ids"]) == 2


# --- another model, an adapter ---------------------------------------------------------------------------------------


def test_a_model_of_its_own_folder_judges_as_the_checkpoint_with_the_same_weights(judges, tiny, standing_alone):
    judge = judge_of(tiny("text_to_image"), model=str(standing_alone))
    assert judge(INSTRUCTION, [SOURCE], OUTPUT) == judges["qwen_image_21"](INSTRUCTION, [SOURCE], OUTPUT)


def test_of_a_model_on_the_hub_its_own_files_are_fetched_and_no_pickle_or_code(
    judges, tiny, standing_alone, tmp_path, loopback_hub
):
    for name in ("model.bin", "code.py", "onnx/model.safetensors", "README.md"):
        (standing_alone / name).parent.mkdir(exist_ok=True)
        (standing_alone / name).write_text("nothing to fetch")
    loopback_hub.upload("org/judge", standing_alone)
    loopback_hub.upload("org/adapter", adapter(tiny("qwen_image_21"), tmp_path / "adapter", r=4))
    code = "import torch; from hf_qie.config.evaluation import Judge; from hf_qie.models.judge import EditJudge\n"
    code += "judge = EditJudge(Judge(model='org/judge', adapter='org/adapter'), checkpoint='none', revision=None, "
    code += "device=torch.device('cpu'))\n"
    code += "print(*sorted(path.name for folder in (*judge.folders, judge.adapter) for path in folder.iterdir()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=loopback_hub.environment(tmp_path / "home"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    own = {path.name for path in judges["qwen_image_21"].files}
    assert set(done.stdout.split()) == own | {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_changes_what_the_judge_says_as_its_merged_weights_do(judges, tiny, tmp_path):
    checkpoint = tiny("edit_plus")
    with_adapter = judge_of(checkpoint, adapter=str(adapter(checkpoint, tmp_path / "adapter", r=4)))
    scores = with_adapter(INSTRUCTION, [SOURCE], OUTPUT)
    plain = judges["edit_plus"](INSTRUCTION, [SOURCE], OUTPUT)
    assert abs(scores["judge_followed"] - plain["judge_followed"]) > 1e-3
    merged = with_adapter.model
    for module in merged.modules():
        if hasattr(module, "merge"):
            module.merge()
    assert with_adapter(INSTRUCTION, [SOURCE], OUTPUT) == pytest.approx(scores, rel=1e-3)
    assert len(with_adapter.files) == len(judges["edit_plus"].files) + 2


def test_an_adapter_of_an_earlier_release_of_transformers_is_the_same(tiny, tmp_path):
    """Which called the layers of Qwen2.5-VL model.layers."""
    folder = adapter(tiny("edit_plus"), tmp_path / "adapter", r=4)
    now = judge_of(tiny("edit_plus"), adapter=str(folder))(INSTRUCTION, [SOURCE], OUTPUT)
    tensors = load_file(folder / "adapter_model.safetensors")
    earlier = {name.replace(".model.language_model.layers.", ".model.layers."): one for name, one in tensors.items()}
    assert earlier.keys() != tensors.keys()
    save_file(earlier, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert judge_of(tiny("edit_plus"), adapter=str(folder))(INSTRUCTION, [SOURCE], OUTPUT) == now


# --- what cannot judge -----------------------------------------------------------------------------------------------


def told(call) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_for_text_alone_has_no_judge(tiny):
    message = told(lambda: judge_of(tiny("text_to_image")))
    assert "makes images of text alone and has no processor for images; name a vision-language model" in message


def test_a_model_without_a_language_head_is_refused(standing_alone, tiny):
    model = AutoModelForImageTextToText.from_pretrained(standing_alone)
    model.model.save_pretrained(standing_alone)
    message = told(lambda: judge_of(tiny("edit_plus"), model=str(standing_alone)).model)
    assert message.endswith("has no lm_head.weight; a judge needs its language head")


def test_a_language_model_is_no_judge(tmp_path, tiny):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=32, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path)
    message = told(lambda: judge_of(tiny("edit_plus"), model=str(tmp_path)))
    assert message.endswith("is a qwen2, not a vision-language model that answers")
    assert "is not a model of transformers" in told(lambda: judge_of(tiny("edit_plus"), model=str(tiny("edit_plus"))))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("preprocessor_config.json processor_config.json", "has no processor"),
        ("chat_template.jinja", "has no chat template; take a model that was trained on instructions"),
        ("model.safetensors", "cannot load"),
    ],
)
def test_what_is_missing_of_a_model_is_one_line(standing_alone, tiny, removed, message):
    for name in removed.split():
        (standing_alone / name).unlink(missing_ok=True)
    assert message in told(lambda: judge_of(tiny("edit_plus"), model=str(standing_alone)).model)


def test_pickled_weights_are_not_read(standing_alone, tiny):
    weights = AutoModelForImageTextToText.from_pretrained(standing_alone).state_dict()
    torch.save(weights, standing_alone / "pytorch_model.bin")
    (standing_alone / "model.safetensors").unlink()
    assert "cannot load" in told(lambda: judge_of(tiny("edit_plus"), model=str(standing_alone)).model)


def test_an_answer_that_is_not_one_token_is_refused(standing_alone, tiny):
    tokenizer = AutoTokenizer.from_pretrained(standing_alone)
    tokenizer.add_tokens(["\n7"])
    tokenizer.save_pretrained(standing_alone)
    message = told(lambda: judge_of(tiny("edit_plus"), model=str(standing_alone)))
    assert "has no token for '7' behind its chat template, but ['\\n7']" in message


def test_a_template_that_leaves_images_out_is_refused(standing_alone, tiny):
    (standing_alone / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    message = told(lambda: judge_of(tiny("edit_plus"), model=str(standing_alone)))
    assert "does not take an image and text" in message


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"r": 4}, {"target_modules": ["no_layer"]}, "cannot load"),
        ({"r": 4}, {"target_modules": ["q_proj", "k_proj"]}, "is not of this model"),
        ({"r": 4}, {"r": 2}, "is not of this model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tiny, tmp_path, options, change, message):
    folder = adapter(tiny("edit_plus"), tmp_path / "adapter", **options)
    config = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert message in told(lambda: judge_of(tiny("edit_plus"), adapter=str(folder)).model)


def test_an_adapter_without_its_files_is_refused_before_anything_is_loaded(tiny, tmp_path):
    folder = adapter(tiny("edit_plus"), tmp_path / "adapter", r=4)
    (folder / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in told(lambda: judge_of(tiny("edit_plus"), adapter=str(folder)))


def test_the_hub_is_asked_for_what_is_no_folder_here(tiny):
    for key in ("model", "adapter"):
        with pytest.raises(InputError) as error:
            judge_of(tiny("edit_plus"), **{key: "org/judge"})
        assert f"evaluation.judge.{key}: 'org/judge' is not a folder here" in str(error.value)


# --- agreement with people -------------------------------------------------------------------------------------------


def test_agreement_counts_pairs_that_people_order_and_correlates_all():
    rows = [("overall", [3, 2, 1], [9.0, 5.0, 1.0]), ("overall", [1, 2], [4.0, 4.0]), ("consistency", [1, 0], [1, 2])]
    found = agreement(rows)
    assert found["overall"] == pytest.approx({"rows": 2, "pairs": 4, "accuracy": 0.75, "spearman": 8 / 85.5**0.5})
    assert found["consistency"] == pytest.approx({"rows": 1, "pairs": 1, "accuracy": 0, "spearman": -1})


def test_a_bench_is_read_by_its_columns_and_an_edit_judged_once(tiny, tmp_path, monkeypatch):
    features = {"text": Value("string"), "source": ImageFeature(), "edits": List(ImageFeature())}
    row = {"text": INSTRUCTION, "source": SOURCE, "edits": [OUTPUT, noise(2)]}
    rows = [row | {"of": "consistency"}, row | {"of": "prompt_following"}, row | {"of": "overall"}]
    Dataset.from_list(rows, features=Features(features | {"of": Value("string")})).to_parquet(tmp_path / "a.parquet")
    asked, judge = [], EditJudge.__call__
    monkeypatch.setattr(EditJudge, "__call__", lambda self, *one: asked.append(judge(self, *one)) or asked[-1])
    columns = ["--instruction", "text", "--source", "source", "--outputs", "edits", "--dimension", "of"]
    found = measure([str(tmp_path), "--checkpoint", str(tiny("edit_plus")), *columns])
    assert len(asked) == 2
    for dimension, score in (("consistency", "judge_preserved"), ("prompt_following", "judge_followed")):
        assert found[dimension]["accuracy"] == float(asked[0][score] > asked[1][score])
    assert found["overall"]["accuracy"] == float(asked[0]["judge"] > asked[1]["judge"])
