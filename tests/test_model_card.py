"""A pushed export says what it is, from what was recorded alone, and the code on its card runs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from embedding_sets import write_recipe
from hub import TOKEN, Hub, folders_of_this_machine
from PIL import Image

from hf_qie import export
from hf_qie.config.recipe import load_recipe
from hf_qie.train import train
from hf_qie.training.sets import open_sets

KINDS = ("lora", "comfyui", "merged", "pipeline")
LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "attention"}}
# `…` stands for anything in its line
CARD = """\
---
base_model: org/base
library_name: diffusers
license: cc-by-4.0
pipeline_tag: image-to-image
tags:
- hf_qie
- qwen-image-edit
- lora
base_model_relation: adapter
---

<!-- … -->
# org/lora

A LoRA for [org/base](https://huggingface.co/org/base), trained by hf_qie for 4 steps.

## Use

```python
import torch
from diffusers import QwenImageEditPlusPipeline

pipe = QwenImageEditPlusPipeline.from_pretrained("org/base", dtype=torch.float32)
pipe.load_lora_weights("org/lora")
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
```

```python
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from diffusers.utils import load_image

pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = 64 * 64  # sources are seen as in training
source = load_image("input.png")
image = pipe(
    image=[source],
    prompt="Make the sky red",
    negative_prompt=" ",
    true_cfg_scale=4.0,
    height=64,  # any shape of about this area, on which it was trained
    width=64,
).images[0]
image.save("output.png")
```

## Training

- base: [org/base](https://huggingface.co/org/base)
- trained: a LoRA of rank 4, alpha 8, on `attention`
- 4 steps of 4 rows
- on 1 x cpu, arithmetic in float32
- learning rate 0.05, linear schedule, optimizer adamw_torch…
- these weights are float32

| task | sources | rows | weight | share |
|---|---|---|---|---|
| `edit` | 1 | 6 | 3 | 0.7500 |
| `text_to_image` | 0 | 8 | 1 | 0.2500 |

The share is the probability that a draw takes a row of that task with that number of sources.

## Losses

| loss | at step | | at step | |
|---|---|---|---|---|
| training | 1 | … | 4 | … |
| training, `edit` | 1 | … | 4 | … |
| evaluation | 2 | … | 4 | … |
| evaluation, `edit` | 2 | … | 4 | … |
| evaluation, sigma … | 2 | … | 4 | … |

Training: the mean over the steps since the log before. Evaluation: on held-out rows, at fixed noise.

## Images

![Edits of held-out rows in the course of training](pictures.png)

## Versions

torch …, transformers …, diffusers …, accelerate …, peft …, datasets …

## Recipe

As it was run; paths outside the working directory are shortened to their last part.

```yaml
{recipe}```

## Licence

cc-by-4.0
<!-- hf_qie: end -->
"""
# each card's code as it stands, and once without the LoRA
EDIT = """
import re, sys, torch
from pathlib import Path
from types import SimpleNamespace
from huggingface_hub import ModelCard
from hf_qie.training.setup import base_commit

def run(card, name):
    torch.manual_seed(0)
    for code in re.findall(r"```python\\n(.*?)```", card, re.DOTALL):
        exec(code, globals())
    Path("output.png").rename(f"{name}.png")

cards = {kind: ModelCard.load(f"org/{kind}").content for kind in sys.argv[1:]}
for kind, card in cards.items():
    run(card, kind)
run(cards["lora"].replace('pipe.load_lora_weights("org/lora")', ""), "base")
print(base_commit(SimpleNamespace(model="org/base", revision=None)))
"""
REFUSED = """
import os, sys
from hf_qie import export
from hf_qie.config.recipe import InputError
for line in sys.argv[1:]:
    if line.endswith("--no-token"):
        del os.environ["HF_TOKEN"]
    try:
        export.main(line.removesuffix("--no-token").split())
    except InputError as error:
        print(error)
"""


def script(hub: Hub, home: Path, *command: object, cwd: Path, token: str | None = TOKEN):
    """A process that takes the loopback Hub for the Hub."""
    environment = hub.environment(home, token=token)
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=cwd)


@pytest.fixture(scope="module")
def run(built_once, tiny) -> Path:
    """The folder `run` of a LoRA with evaluation and images, on a base whose name is org/base on the Hub."""

    def build(folder: Path) -> None:
        folder.mkdir()
        path = write_recipe(
            folder,
            tiny(),
            tasks={"edit": {"data": str(folder / "private-data" / "edit.jsonl"), "eval_rows": 2, "weight": 3}},
            extract={"image_sample_size": 64, "source_sample_size": 64},
            trainable=LORA,
            training={"learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 2},
        )
        recipe = load_recipe(path)
        train(recipe, open_sets(recipe))
        kept = folder / "run" / "recipe.yaml"
        kept.write_text("model: org/base\n" + kept.read_text().partition("\n")[2])
        record = json.loads((folder / "run" / "run.json").read_text())
        del record["started_in"]  # a base of the Hub is found from anywhere
        (folder / "run" / "run.json").write_text(json.dumps(record))
        Image.new("RGB", (8, 8)).save(folder / "run" / "pictures.png")

    return built_once("carded", build) / "run"


@pytest.fixture(scope="module")
def pushed(built_once, tiny, run, root) -> Path:
    """A Hub in `hub` with the run in each form, as org/<kind>; what was said in `said.txt`, each folder in `to`."""

    def build(folder: Path) -> None:
        folder.mkdir()
        code = "import sys; from hf_qie import export\nfor line in sys.argv[1:]: export.main(line.split())"
        lines = [
            f"{run} --to {kind} --output {folder / 'to' / kind} --push_to_hub org/{kind} --dtype float32"
            " --license cc-by-4.0"
            for kind in KINDS
        ]
        with Hub(folder / "hub") as hub:
            hub.upload("org/base", tiny())
            done = script(hub, folder / "home", "-c", code, *lines, cwd=root)
            assert done.returncode == 0, done.stderr
        (folder / "said.txt").write_text(done.stdout + done.stderr, encoding="utf-8")

    return built_once("pushed_exports", build)


def test_the_card_is_what_was_recorded_and_nothing_else(pushed):
    text = (pushed / "to" / "lora" / "README.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    lines = CARD.format(recipe=recipe).splitlines()
    patterns = [re.escape(line + "\n").replace("…", ".+") for line in lines]
    patterns = [f"({pattern})+" if "sigma" in line else pattern for line, pattern in zip(lines, patterns, strict=True)]
    assert re.fullmatch("".join(patterns), text), text
    shown = yaml.safe_load(recipe)
    assert shown["model"] == "org/base"
    assert shown["tasks"]["edit"]["data"] == ["edit.jsonl"]
    assert shown["trainable"]["lora"]["rank"] == 4
    assert shown["training"]["learning_rate"] == 0.05


def test_losses_on_the_card_are_those_of_the_log(pushed, run):
    text = (pushed / "to" / "lora" / "README.md").read_text(encoding="utf-8")
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    for name, key in (("training", "loss"), ("evaluation", "eval_loss"), ("evaluation, `edit`", "eval_loss/edit")):
        first, *_, last = [(entry["step"], entry[key]) for entry in history if key in entry]
        assert f"| {name} | {first[0]} | {first[1]:.4f} | {last[0]} | {last[1]:.4f} |\n" in text


def test_the_repository_is_the_folder_and_private(pushed):
    with Hub(pushed / "hub") as hub:
        for kind in KINDS:
            there = {path for path in hub.files(f"org/{kind}", kind="models") if path != ".gitattributes"}
            folder = pushed / "to" / kind
            assert there == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            assert all(hub.read(f"org/{kind}", path, kind="models") == (folder / path).read_bytes() for path in there)
            assert hub.repository("models", f"org/{kind}")["private"]


def test_no_token_and_no_folder_of_this_machine_leaves_it(pushed, run):
    secrets = [TOKEN, str(pushed), str(run.parent), "private-data", *folders_of_this_machine()]
    texts = {path.name: path.read_bytes().decode("latin-1") for path in (pushed / "hub" / "blobs").iterdir()}
    assert not {(name, secret) for name, text in texts.items() for secret in secrets if secret in text}
    assert TOKEN not in (pushed / "said.txt").read_text(encoding="utf-8")


def test_the_code_on_the_cards_runs_and_all_forms_give_one_image(pushed, tmp_path):
    Image.effect_noise((80, 64), 64).convert("RGB").save(tmp_path / "input.png")
    with Hub(pushed / "hub") as hub:
        done = script(hub, tmp_path / "home", "-c", EDIT, *KINDS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    base, *images = [np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("base", *KINDS)]
    assert base.shape == (64, 64, 3)
    assert abs(base - images[0]).max() > 10, "what was trained shows"
    for kind, image in zip(KINDS, images, strict=True):
        assert abs(image - images[0]).max() <= 1, kind  # float32 in another order, rounded to 8 bits
    assert done.stdout.split()[-1] == hub.repository("models", "org/base")["refs"]["main"]


def test_what_people_wrote_on_the_card_is_kept(pushed, run, root, tmp_path):
    shutil.copytree(pushed / "hub", tmp_path / "hub")
    with Hub(tmp_path / "hub") as hub:
        card = hub.read("org/lora", "README.md", kind="models").decode()
        ours = card.replace("<!-- hf_qie: what", "My words.\n\n<!-- hf_qie: what") + "\n## Mine\n"
        ours = ours.replace("tags:\n", "tags:\n- mine\n").replace("\n---\n\n", "\ndatasets:\n- org/edits\n---\n\n", 1)
        hub.write("org/lora", "README.md", ours.encode(), kind="models")
        to = ["--output", tmp_path / "to", "--push_to_hub", "org/lora", "--dtype", "float32"]
        done = script(hub, tmp_path / "home", root / "hf_qie" / "export.py", run, *to, cwd=root)
        assert done.returncode == 0, done.stderr
        assert f"pushed: {hub.url}/org/lora" in done.stderr
        renewed = hub.read("org/lora", "README.md", kind="models").decode()
    (_, was, words), (_, data, text) = ours.split("---\n", 2), renewed.split("---\n", 2)
    assert text == words
    assert yaml.safe_load(data) == yaml.safe_load(was)


def test_a_push_that_cannot_succeed_fails_before_anything_is_written(pushed, run, root, tmp_path):
    to = f"{run} --output {tmp_path / 'to'} --push_to_hub org/lora"
    with Hub(pushed / "hub") as hub:
        lines = [f"{to} --public", f"{to} --license mine", f"{to}--no-token"]
        done = script(hub, tmp_path / "home", "-c", REFUSED, *lines, cwd=root)
    assert done.returncode == 0, done.stderr
    public, license, token = re.split(r"\n(?=--)", done.stdout)
    assert public == "--push_to_hub: org/lora exists and is private; change --public to match, or push elsewhere"
    assert license.startswith("--license: the Hub does not take 'mine'")
    assert token.startswith("--push_to_hub: org/lora; the Hub answers: ")
    assert "log in with `hf auth login`, or set HF_TOKEN" in token
    assert not (tmp_path / "to").exists()


def test_a_run_that_left_no_record_is_exported_with_a_card_of_what_is_known(run, tiny, tmp_path):
    old = shutil.copytree(run, tmp_path / "old", ignore=shutil.ignore_patterns("run.json", "pictures.png"))
    recipe = (old / "recipe.yaml").read_text()
    (old / "recipe.yaml").write_text(recipe.replace("org/base", str(tiny()), 1))
    export.main([str(old)])
    text = (old / "export" / "lora" / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in text, "a folder is no name on the Hub"
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Use", "Training", "Losses", "Recipe", "Licence"]
    assert "- 4 steps\n- these weights are bfloat16\n" in text


@pytest.mark.parametrize(
    ("base", "said", "unsaid"),
    [
        (
            "edit",
            "pipe = QwenImageEditPipeline.from_pretrained(|    image=source,|pipeline_tag: image-to-image",
            "VAE_IMAGE",
        ),
        (
            "text_to_image",
            'QwenImagePipeline|    prompt="A red boat on a lake",|pipeline_tag: text-to-image',
            "load_image",
        ),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_code_on_the_card_is_for_the_bases_own_pipeline(run, tiny, tmp_path, base, said, unsaid, kind):
    copy = shutil.copytree(run, tmp_path / "copy")
    recipe = (copy / "recipe.yaml").read_text().replace("org/base", str(tiny(base)), 1)
    (copy / "recipe.yaml").write_text(recipe.replace("source_sample_size: 64", "source_sample_size: null"))
    export.main([str(copy), "--to", kind])
    text = (copy / "export" / kind / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        compile(code, "card", "exec")
    assert all(part in text for part in said.split("|"))
    assert unsaid not in text
    assert ("QwenImageTransformer2DModel" in text) == (kind == "merged")


@pytest.mark.parametrize(("base", "kind"), [("edit_plus", "lora"), ("edit_plus", "pipeline"), ("edit", "lora")])
def test_the_code_on_the_card_of_a_run_without_sources_needs_none(run, tiny, tmp_path, base, kind, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "copy")
    recipe = (copy / "recipe.yaml").read_text().replace("org/base", str(tiny(base)), 1)
    (copy / "recipe.yaml").write_text(recipe)
    record = json.loads((copy / "run.json").read_text())
    record["mix"] = [group | {"sources": 0} for group in record["mix"]]
    (copy / "run.json").write_text(json.dumps(record))
    export.main([str(copy), "--to", kind])
    text = (copy / "export" / kind / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-to-image\n" in text
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert "pipe = QwenImagePipeline.from_pretrained(" in code
    folder = copy / "export" / kind
    code = code.replace(f'"{base}"', repr(str(tiny(base)))).replace(f'"{kind}"', repr(str(folder)))
    code = code.replace('("cuda" if torch.cuda.is_available() else "cpu")', '("cpu")')
    code = code.replace("width=64,", "width=64, num_inference_steps=2,").replace("bfloat16", "float32")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert Image.open("output.png").size == (64, 64)


def test_of_a_run_that_ended_with_its_best_step_the_card_is_that_steps(run, tiny, tmp_path):
    best = shutil.copytree(run, tmp_path / "best", ignore=shutil.ignore_patterns("checkpoint-*"))
    recipe = (best / "recipe.yaml").read_text().replace("org/base", str(tiny()), 1)
    (best / "recipe.yaml").write_text(recipe + "  load_best_model_at_end: true\n")
    state = json.loads((best / "trainer_state.json").read_text())
    (best / "trainer_state.json").write_text(json.dumps(state | {"best_model_checkpoint": "run/checkpoint-2"}))
    record = json.loads((best / "run.json").read_text())
    record["changes"] = [{"step": 1, "changed": {"learning_rate": [0.1, 0.05], "weight_decay": [0.0, 0.5]}}]
    (best / "run.json").write_text(json.dumps(record))
    export.main([str(best)])
    text = (best / "export" / "lora" / "README.md").read_text(encoding="utf-8")
    assert "trained by hf_qie for 2 steps" in text
    assert "- 2 of 4 steps, the best by `loss`, of 4 rows\n" in text
    assert "_fused\n- from step 1 on: learning_rate 0.1 -> 0.05, weight_decay 0.0 -> 0.5\n- these weights are" in text
    assert re.search(r"\| evaluation \| 2 \| (\S+) \| 2 \| \1 \|", text)


SCORED = """
## Scores

| score | base | step 2 | step 4 | meaning |
|---|---|---|---|---|
| `edited` | 0.100 | 0.900 | 0.800 | share of the change from source to target that happened: 0 none, 1 all |
| `kept_error`, levels | 3.000 |  | 2.500 | mean absolute error where source and target are equal |

1,200 held-out rows. The best by `edited` is step 2.

## Edits that were not trained on

| score | base | step 4 | meaning |
|---|---|---|---|
| `changed`, levels | 10.000 | 12.500 (+2.500) | mean absolute difference of output and source |
| `base_psnr`, dB |  | 31.200 | of the output to what the base makes of the row: how far training moved it |

16 rows of org/bench; in brackets what it differs by from the base.

## Images
"""


def test_scores_are_on_the_card_where_there_are_some(run, tiny, tmp_path):
    """Of the base, the best, the last, and the weights that are exported."""
    copy = shutil.copytree(run, tmp_path / "copy")
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace("org/base", str(tiny()), 1))
    export.main([str(copy), "--output", str(tmp_path / "without")])
    assert "## Scores" not in (tmp_path / "without" / "README.md").read_text(encoding="utf-8")
    scores = {0: {"edited": 0.1, "kept_error": 3.0}, 1: {"edited": 0.5}}
    scores |= {2: {"edited": 0.9, "edited/edit": 1.0}, 4: {"edited": 0.8, "kept_error": 2.5}}
    names = {step: f"checkpoint-{step}" if step else "base" for step in scores}
    found = {names[step]: {"step": step, "scores": some} for step, some in scores.items()}
    summary = {"metric": "edited", "best": "checkpoint-2", "rows": 1200, "checkpoints": found}
    others = {0: {"changed": 10.0}, 4: {"changed": 12.5, "base_psnr": 31.2}}
    found = {names[step]: {"step": step, "scores": some} for step, some in others.items()}
    foreign = {"data": "org/bench", "rows": 16, "checkpoints": found}
    folder = copy / "evaluation" / "regression" / "bench"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(foreign))
    (copy / "evaluation" / "summary.json").write_text(json.dumps(summary))
    export.main([str(copy)])
    assert SCORED in (copy / "export" / "lora" / "README.md").read_text(encoding="utf-8")
    export.main([str(copy / "checkpoint-2")])
    assert "| score | base | step 2 | step 4 | meaning |" in (copy / "export" / "lora-2" / "README.md").read_text()
