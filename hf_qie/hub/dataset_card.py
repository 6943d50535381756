"""Cards, rendered from what was recorded: the dataset card of published embedding sets, and what both cards share."""

import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from datasets import DatasetInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData
from jinja2 import Environment, StrictUndefined

from hf_qie.data.provenance import UNKNOWN
from hf_qie.data.schema import TEXT_EMBEDS, column_of, prompt_columns_in
from hf_qie.models.base import Family, families, family_name
from hf_qie.runtime.yaml_io import write_yaml

BEGIN = "<!-- hf_qie: what stands from here to the end mark is written anew at each push, all else is kept -->\n"
END = "<!-- hf_qie: end -->\n"


def dataset_card(
    card: DatasetCard | None,
    *,
    repo: str,
    infos: Mapping[str, DatasetInfo],
    data_files: Mapping[str, str],
    provenances: Mapping[str, Mapping[str, Any]],
    license: str | None,
) -> DatasetCard:
    """The card of `repo`. Of `card`, the present one, other configs and what people wrote are kept.

    `infos` and `data_files` (a pattern) are those of the configs that are pushed; `provenances` those of every
    embedding set in the repository, as published.
    """
    data, makers = card.data if card else DatasetCardData(), makers_of(provenances)
    for name, value in license_of(data, makers, license).items():
        data[name] = value
    tags = ["hf_qie", *(tag for family in makers for tag in family.card_tags), "image-to-image"]
    data["tags"] = list(dict.fromkeys((*(data.get("tags") or ()), *tags)))
    configs = MetadataConfigs.from_dataset_card_data(data)
    for name, pattern in data_files.items():
        default = {} if any(config.get("default") for config in configs.values()) else {"default": True}
        configs[name] = configs.get(name, default) | {"data_files": [{"split": "train", "path": pattern}]}
    configs.to_dataset_card_data(data)
    DatasetInfosDict(infos).to_dataset_card_data(data)
    default = configs.get_default_config_name()
    infos = DatasetInfosDict.from_dataset_card_data(data)
    body = _body(infos, provenances, default=default, repo=repo, license=named_license(data), makers=makers)
    return DatasetCard(renewed(card.text if card else "", data, body))


def makers_of(provenances: Mapping[str, Mapping[str, Any]]) -> list[Family]:
    """The families of sets, by what is known of them; of a set that none makes today, all of the name that it has."""
    makers: list[Family] = []
    for compat in (provenance["compat"] for provenance in provenances.values()):
        named = [family for family in families() if family.card_name == family_name(compat)]
        same = [
            family
            for family in named
            if all(compat.get(key) in (value, UNKNOWN) for key, value in family.compat.items())
        ]
        makers += same or named
    return [family for family in families() if family in makers]


def license_of(present: Any, makers: Iterable[Family], license: str | None) -> dict[str, str | None]:
    """The licence among a card's metadata: `license`, else that of the `present` ones, else one of a family's own."""
    kept = {name: present.get(name) for name in ("license", "license_name", "license_link")}
    if license and license != kept["license"]:  # what is kept names another licence
        return dict.fromkeys(kept) | {"license": license}
    own = [family for family in makers if family.license_name]
    if kept["license"] or not own:
        return kept
    return {"license": "other", "license_name": own[0].license_name, "license_link": own[0].license_link}


def named_license(data: Any) -> str | None:
    """The licence in a card's metadata, as its text names it."""
    name, link = data.get("license_name") or data.get("license"), data.get("license_link")
    return f"[{name}]({link})" if link else name


def notice_of(makers: Iterable[Family]) -> str:
    """What `NOTICE` says beside something that was made with these families; "" where nothing has to be said."""
    return "\n\n".join(dict.fromkeys(family.license_notice for family in makers if family.license_notice))


def _body(
    infos: Mapping[str, DatasetInfo], provenances: Mapping[str, Any], *, default: str | None, **values: Any
) -> str:
    records = {name: provenances[name]["record"] for name in sorted(provenances)}
    first = default if default in records else next(iter(records))
    return rendered(
        "dataset_card.md",
        **values,
        rows=sum(record["counts"]["rows_out"] for record in records.values()),
        records=records,
        infos=infos,
        first=first,
        prompt_columns=prompt_columns_in(infos[first].features),
        text_column=next(column for column in infos[first].features if column.startswith(TEXT_EMBEDS)),
        notice=notice_of(values["makers"]),
        columns_of=_alike({name: _columns(infos[name]) for name in records}),
        made_by=_alike({name: _maker(provenances[name]) for name in records}),
        recipes=_alike({name: write_yaml(record["recipe"]) for name, record in records.items()}),
    )


def rendered(template: str, **values: Any) -> str:
    """A template of this folder with these values; one that it names and that is not given is an error."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["n"] = lambda value: value if value == UNKNOWN else f"{value:,}"
    return environment.from_string((files(__package__) / template).read_text(encoding="utf-8")).render(values)


def renewed(text: str, data: Any, body: str) -> str:
    """A card with the metadata `data`, and with `body` between the marks of `text`; what surrounds them is kept."""
    before, _, rest = text.partition(BEGIN)
    before = f"{before.strip()}\n\n" if before.strip() else ""
    return f"---\n{data.to_yaml()}\n---\n\n{before}{BEGIN}{body}{END}{rest.partition(END)[2]}"


def _alike(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each different value once, with the names that have it, as `a`, `b`."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(repr(value), []).append(name)
    return [(", ".join(f"`{name}`" for name in names), values[names[0]]) for names in groups.values()]


def _columns(info: DatasetInfo) -> list[tuple[str, str, str]]:
    """Name, type and meaning of each column."""
    rows = []
    for name, feature in info.features.items():
        column, caption = column_of(name)
        kind = re.sub(r"Value\('(\w+)'\)", r"\1", repr(feature))
        rows.append((name, kind, column.meaning.format(caption=caption)))
    return rows


def _maker(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The model, sizes and versions that made a set."""
    compat, record = provenance["compat"], provenance["record"]
    made = {name: record[name] for name in ("model", "revision", "device", "dtype", "versions")}
    return made | {"compat": compat, "side": record["recipe"]["extract"]["image_sample_size"]}
