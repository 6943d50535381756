"""Cards, made from what was recorded and from nothing else: of a published embedding set, its dataset card."""

import re
from collections.abc import Mapping
from typing import Any

from datasets import DatasetInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData
from jinja2 import Environment, StrictUndefined

from hf_qie.data.provenance import UNKNOWN
from hf_qie.data.schema import column_of
from hf_qie.models.base import families
from hf_qie.runtime.yaml_io import write_yaml

TAGS = ("hf_qie", "qwen-image-edit", "image-to-image")
BEGIN = "<!-- hf_qie: what stands from here to the end mark is written anew at each push, all else is kept -->\n"
END = "<!-- hf_qie: end -->\n"
STOCK_AREAS_PX = {family.vae_area_px for family in families()}

TEMPLATE = """\
# {{ repo }}

What Qwen-Image-Edit sees of {{ rows | n }} edits: the states of its prompt encoder and the latents of its VAE,
computed once by hf_qie, so that fine-tuning needs neither model. There are no pixels in here; pictures are named by
their paths and URLs.

| config | rows | without caption | skipped | MB |
|---|---|---|---|---|
{% for name, config in configs.items() -%}
| `{{ name }}` | {{ config.counts.rows_out | n }} | {{ config.counts.rows_without_caption | n }} |
{{- " " }}{{ config.counts.bad | n }} of {{ config.counts.rows_in | n }} | {{ config.megabytes }} |
{% endfor %}
## Load

```python
import torch
from datasets import load_dataset
ds = load_dataset("{{ repo }}", "{{ first }}", split="train").with_format("torch", {{ selected }})
```

`image_embeds` followed by one `text_embeds_...` is the prompt embedding of a row. To train on a config with hf_qie,
name it in the recipe: `tasks.<name>.embeddings: {{ repo }}:{{ first }}`.

## Columns

A matrix of L tokens is a list of L vectors of fixed length; nothing is padded. An `inverse_` column is the same for
the edit undone, from target to source, and null where a row has no inverse.
{% for names, columns in columns_of %}
{{ names }}:

| column | type | meaning |
|---|---|---|
{% for column, kind, meaning in columns -%}
| `{{ column }}` | `{{ kind }}` | {{ meaning }} |
{% endfor %}{% endfor %}
## Model and template
{% for names, made in makers %}
{{ names }}:

- model `{{ made.model }}`{% if made.revision %}, revision `{{ made.revision }}`{% endif %}
{%- if made.unknown %}
- the states were computed by others, in .pt files; not known of them: {{ made.unknown }}
{%- endif %}
- computed in {{ made.dtype }} on {{ made.device }}, stored as float16
- pixels of a source: {{ made.vlm_area_px | n }} for the prompt encoder, {{ made.vae_area_px | n }} for the VAE
{%- if made.vae_area_px not in stock_areas_px %}; the stock pipeline
  shows the VAE another area, so sample at this one{% endif %}
- pixels of a target: {{ made.target_area_px | n }} (sizes are near these areas, in steps of 32; {{ made.resampling }})
- drop caption: {{ made.drop_caption | tojson }}
- {{ made.versions }}
{% for kind, template in made.templates.items() %}
Template, {{ kind.replace("_", "-") }}{% if "{number}" in template.picture %} ({number} counts the sources){% endif %};
the states of its first {{ template.drop }} tokens are left out, as in the pipeline:

```text
{{ template.before }}{{ template.picture }}{caption}{{ template.after }}```
{% endfor %}{% endfor %}
{%- if skipped %}
## Skipped rows
{% for name, config in configs.items() if config.skipped %}
`{{ name }}`:

{% for reason, count in config.skipped.items() -%}
- {{ count | n }}: {{ reason }}
{% endfor %}{% endfor %}{% endif %}
## Recipe

As it was run; of paths outside the working directory the last part.
{% for names, recipe in recipes %}
{{ names }}:

```yaml
{{ recipe }}```
{% endfor %}
## Licence

{{ license or "None is named." }}
"""


def dataset_card(
    card: DatasetCard | None,
    *,
    repo: str,
    infos: Mapping[str, DatasetInfo],
    data_files: Mapping[str, str],
    provenances: Mapping[str, Mapping[str, Any]],
    license: str | None,
) -> DatasetCard:
    """The card of `repo`, from `card`, the one that is there: other configs and what people wrote are kept.

    `infos` and `data_files` (a pattern) are those of the configs that are pushed; `provenances` those of every
    embedding set in the repository, as published.
    """
    data = card.data if card else DatasetCardData()
    data.license = license or data.license
    data["tags"] = list(dict.fromkeys((*(data.get("tags") or ()), *TAGS)))
    configs = MetadataConfigs.from_dataset_card_data(data)
    for name, pattern in data_files.items():
        default = {} if any(config.get("default") for config in configs.values()) else {"default": True}
        configs[name] = configs.get(name, default) | {"data_files": [{"split": "train", "path": pattern}]}
    configs.to_dataset_card_data(data)
    DatasetInfosDict(infos).to_dataset_card_data(data)
    text = renewed(card.text if card else "", card_body(repo, data, provenances))
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def renewed(text: str, body: str) -> str:
    """A card's text with `body` between the marks; what people wrote around them is kept."""
    before, _, rest = text.partition(BEGIN)
    words = f"{before.strip()}\n\n" if before.strip() else ""
    return f"{words}{BEGIN}{body}{END}{rest.partition(END)[2]}"


def rendered(template: str, **values: Any) -> str:
    """The template with these values; one that it names and nobody gave is an error."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["n"] = lambda value: value if value == UNKNOWN else f"{value:,}"
    return environment.from_string(template).render(values)


def card_body(repo: str, data: DatasetCardData, provenances: Mapping[str, Mapping[str, Any]]) -> str:
    """What the card says below its metadata, which name the features of every config."""
    infos = DatasetInfosDict.from_dataset_card_data(data)
    configs = {
        name: {
            "megabytes": f"{infos[name].dataset_size / 1e6:,.1f}",
            "counts": provenance["record"]["counts"],
            "skipped": provenance["record"]["skipped"],
        }
        for name, provenance in sorted(provenances.items())
    }
    default = MetadataConfigs.from_dataset_card_data(data).get_default_config_name()
    first = default if default in configs else next(iter(configs))
    text = next(column for column in infos[first].features if column.startswith("text_embeds_"))
    return rendered(
        TEMPLATE,
        repo=repo,
        rows=sum(config["counts"]["rows_out"] for config in configs.values()),
        configs=configs,
        skipped=any(config["skipped"] for config in configs.values()),
        first=first,
        selected=f'columns=["image_embeds", "{text}"], dtype=torch.float16',
        columns_of=alike({name: described(infos[name]) for name in configs}),
        makers=alike({name: maker_of(provenances[name]) for name in configs}),
        stock_areas_px=STOCK_AREAS_PX,
        recipes=alike({name: write_yaml(provenances[name]["record"]["recipe"]) for name in configs}),
        license=data.license,
    )


def alike(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each different value once, with the names that have it, as `a`, `b`."""
    groups: list[tuple[list[str], Any]] = []
    for name, value in values.items():
        names = next((names for names, known in groups if known == value), None)
        if names is None:
            groups.append((names := [], value))
        names.append(f"`{name}`")
    return [(", ".join(names), value) for names, value in groups]


def described(info: DatasetInfo) -> list[tuple[str, str, str]]:
    """Name, type and meaning of each column."""
    kinds = {name: re.sub(r"Value\('(\w+)'\)", r"\1", repr(feature)) for name, feature in info.features.items()}
    found = {name: column_of(name) for name in kinds}
    return [(name, kinds[name], column.meaning.format(caption=caption)) for name, (column, caption) in found.items()]


def maker_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """With what a set was made."""
    compat, record = provenance["compat"], provenance["record"]
    named = ("vlm_area_px", "vae_area_px", "resampling", "drop_caption")
    return {
        "model": record["model"],
        "revision": record["revision"],
        "device": record["device"],
        "versions": ", ".join(f"{library} {version}" for library, version in record["versions"].items()),
        "dtype": record["dtype"],
        "target_area_px": record["recipe"]["extract"]["image_sample_size"] ** 2,
        "templates": {} if compat["templates"] == UNKNOWN else compat["templates"],
        "unknown": ", ".join(field for field, value in compat.items() if value == UNKNOWN),
        **{name: compat[name] for name in named},
    }
