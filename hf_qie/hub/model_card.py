"""The model card of an exported folder, made from what the run left on record and from nothing else."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_qie.config.recipe import as_dict
from hf_qie.hub.dataset_card import TAGS, rendered, renewed
from hf_qie.hub.export_formats import comfyui_file
from hf_qie.hub.redact import public
from hf_qie.hub.trained_run import Trained
from hf_qie.models.base import read_family
from hf_qie.runtime.yaml_io import write_yaml

PICTURES = "pictures.png"  # edits of held-out rows, where the run has made some
CARD = "README.md"
# how the Hub calls it, and in words
RELATIONS = {
    "lora": ("adapter", "A LoRA for"),
    "comfyui": ("adapter", "A LoRA, in ComfyUI's keys, for"),
    "merged": ("finetune", "A fine-tuned transformer for"),
    "pipeline": ("finetune", "A fine-tune of"),
}
TEMPLATE = """\
# {{ title }}

{{ what }} {{ base_link }}, trained by hf_qie for {{ step | n }} steps.

## Use
{% if kind == "comfyui" %}
In ComfyUI: put `{{ file }}` into `models/loras` and choose it in a "LoraLoaderModelOnly" node. In diffusers:
{% endif %}
```python
import torch
from diffusers import {{ "QwenImageTransformer2DModel, " if kind == "merged" }}{{ pipeline }}
{% if kind == "merged" %}
transformer = QwenImageTransformer2DModel.from_pretrained("{{ where }}", torch_dtype=torch.{{ dtype }})
{%- endif %}
pipe = {{ pipeline }}.from_pretrained("{{ where if kind == "pipeline" else base }}"
{%- if revision and kind != "pipeline" %}, revision="{{ revision }}"{% endif %}
{%- if kind == "merged" %}, transformer=transformer{% endif %}, torch_dtype=torch.{{ dtype }})
{% if kind == "lora" -%}
pipe.load_lora_weights("{{ where }}")
{% elif kind == "comfyui" -%}
pipe.load_lora_weights("{{ where }}", weight_name="{{ file }}")
{% endif -%}
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
```

```python
{% if sources -%}
{% if source_side -%}
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
{% endif -%}
from diffusers.utils import load_image
{% if source_side %}
pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = {{ source_side }} * {{ source_side }}  # sources are seen as in training
{%- endif %}
source = load_image("input.png")
image = pipe(
    image={{ "[source]" if sources == "several" else "source" }},
    prompt="Make the sky red",
{%- else -%}
image = pipe(
    prompt="A red boat on a lake",
{%- endif %}
    negative_prompt=" ",
    true_cfg_scale=4.0,
    height={{ target_side }},  # any shape of about this area, on which it was trained
    width={{ target_side }},
).images[0]
image.save("output.png")
```

## Training

- base: {{ base_link }}{% if commit %}, commit `{{ commit }}`{% elif revision %}, revision `{{ revision }}`{% endif %}
- trained: {{ trains }}
- {{ step | n }}{% if run and run.steps != step %} of {{ run.steps | n }}{% endif %} steps
{%- if best %}, the best by `{{ best }}`,{% endif %}
{%- if run %} of {{ (run.ranks * run.rows_a_rank * run.accumulated) | n }} rows
{%- if run.ranks * run.accumulated > 1 %} ({{ run.ranks }} ranks x {{ run.rows_a_rank }} rows x
{{- " " }}{{ run.accumulated }} accumulated){% endif %}
- on {{ run.ranks }} x {{ run.device }}{% if run.sharded %}, sharded by FSDP2{% endif %}
{{- ", arithmetic in " }}{{ run.arithmetic }}
- learning rate {{ "%g" | format(run.learning_rate) }}, {{ run.schedule }} schedule, optimizer {{ run.optimizer }}
{%- for at in run.changes | default([]) %}
- from step {{ at.step | n }} on:
{%- for key, two in at.changed.items() %} {{ key }} {{ two | join(" -> ") }}{{ "" if loop.last else "," }}{% endfor %}
{%- endfor %}
{%- endif %}
- these weights are {{ dtype }}
{% if run %}
| task | sources | rows | weight | share |
|---|---|---|---|---|
{% for group in run.mix -%}
| `{{ group.task }}` | {{ group.sources }} | {{ group.rows | n }} | {{ "%g" | format(group.weight) }} |
{{- " " }}{{ "%.4f" | format(group.share) }} |
{% endfor %}
A draw of training takes a row of a task with that number of sources by this share.
{% endif %}
{%- if losses %}
## Losses

| loss | at step | | at step | |
|---|---|---|---|---|
{% for name, first, last in losses -%}
| {{ name }} | {{ first.0 | n }} | {{ "%.4f" | format(first.1) }} | {{ last.0 | n }} | {{ "%.4f" | format(last.1) }} |
{% endfor %}
Training: the mean over the steps since the log before. Evaluation: of rows that were held out, at fixed noise.
{% endif %}
{%- if pictures %}
## Pictures

![Edits of held-out rows in the course of training]({{ pictures }})
{% endif %}
{%- if run %}
## Versions

{{ versions }}
{% endif %}
## Recipe

As it was run; of paths outside the working directory the last part.

```yaml
{{ recipe }}```

## Licence

{{ license or "None is named." }}
"""


def model_card(
    trained: Trained,
    kind: str,
    *,
    dtype: str,
    repo: str | None,
    folder: Path,
    pictures: bool,
    license: str | None = None,
    there: ModelCard | None = None,
) -> ModelCard:
    """The card of an export of that `kind` to `folder`, from where it goes to `repo`.

    `there`: the card that is there, of which what people wrote is kept.
    """
    recipe = trained.recipe
    kept = there.data.to_dict() if there else {}
    license = license or kept.get("license")
    relation, _ = RELATIONS[kind]
    text_to_image = read_family(recipe.model, revision=recipe.revision).edit is None
    tags = [tag for tag in TAGS if tag != "image-to-image"] + (["lora"] if relation == "adapter" else [])
    ours = {
        "license": license,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image" if text_to_image else "image-to-image",
        "tags": list(dict.fromkeys((*(kept.get("tags") or ()), *tags))),
    }
    if not Path(recipe.model).is_dir():  # a name on the Hub
        ours |= {"base_model": recipe.model, "base_model_relation": relation}
    data = ModelCardData(**(kept | ours))
    body = rendered(
        TEMPLATE,
        **values(trained, kind),
        title=repo or trained.name,
        where=repo or public(str(folder)),
        dtype=dtype,
        license=license,
        pictures=PICTURES if pictures else None,
    )
    text = renewed(there.text if there else "", body)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def values(trained: Trained, kind: str) -> dict[str, Any]:
    """What the template shows of a run."""
    recipe, run = trained.recipe, trained.record
    family = read_family(recipe.model, revision=recipe.revision)
    base = public(recipe.model)
    on_hub = not Path(recipe.model).is_dir()
    side = recipe.extract.source_sample_size
    return {
        "kind": kind,
        "what": RELATIONS[kind][1],
        "file": comfyui_file(trained),
        "base": base,
        "base_link": f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`",
        "revision": recipe.revision,
        "commit": run.get("commit"),
        "pipeline": family.pipeline,
        "sources": None if family.edit is None else "one" if family.max_sources == 1 else "several",
        "source_side": side if side and side**2 != family.vae_area_px else None,
        "target_side": recipe.extract.image_sample_size // 16 * 16,
        "step": trained.step,
        "best": trained.best and recipe.training.get("metric_for_best_model", "loss"),
        "trains": trains(trained),
        "run": run,
        "losses": losses(trained),
        "versions": ", ".join(f"{name} {number}" for name, number in run.get("versions", {}).items()),
        "recipe": write_yaml(public(as_dict(recipe))),
    }


def trains(trained: Trained) -> str:
    """What of the model."""
    trainable = trained.recipe.trainable
    if lora := trainable.lora:
        targets = lora.target_modules
        layers = f"`{targets}`" if isinstance(targets, str) else ", ".join(f"`{name}`" for name in targets)
        return f"a LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {layers}"
    if "." in trainable.modules:
        return "all weights of the transformer"
    return "of the transformer " + ", ".join(f"`{part}`" for part in trainable.modules)


def losses(trained: Trained) -> list[tuple[str, tuple[int, float], tuple[int, float]]]:
    """Each logged loss up to the step of the weights: what it is of, (step, value) at first and at last."""
    logged: dict[str, list[tuple[int, float]]] = {}
    for entry in trained.state["log_history"]:
        for key, value in entry.items():
            if key.removeprefix("eval_").split("/")[0] == "loss" and entry["step"] <= trained.step:
                logged.setdefault(key, []).append((entry["step"], value))
    order = sorted(logged, key=lambda key: key.startswith("eval_"))  # as they were logged, training before evaluation
    return [(loss_name(key), logged[key][0], logged[key][-1]) for key in order]


def loss_name(key: str) -> str:
    """A key of the log in words."""
    of, _, part = key.partition("/")
    kind = "evaluation" if of == "eval_loss" else "training"
    return f"{kind}, {part if part.startswith('sigma ') else f'`{part}`'}" if part else kind
