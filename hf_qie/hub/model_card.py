"""The model card of an exported folder, rendered from what the run recorded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_qie.config.recipe import as_dict
from hf_qie.hub.dataset_card import license_of, named_license, rendered, renewed
from hf_qie.hub.redact import public
from hf_qie.hub.trained_run import Trained
from hf_qie.measures.edits import FOREIGN, KNOWN
from hf_qie.runtime.yaml_io import write_yaml

IMAGES = "pictures.png"  # edits of held-out rows, if the run has made any
LOSSES = {"loss": "training", "eval_loss": "evaluation"}  # of keys of the log
# how the Hub calls it, and in words
RELATIONS = {
    "lora": ("adapter", "A LoRA for"),
    "comfyui": ("adapter", "A LoRA, in ComfyUI's keys, for"),
    "merged": ("finetune", "A fine-tuned transformer for"),
    "pipeline": ("finetune", "A fine-tune of"),
}


def model_card(
    trained: Trained,
    kind: str,
    *,
    dtype: str,
    repo: str | None,
    folder: Path,
    license: str | None,
    present: ModelCard | None,
) -> ModelCard:
    """The card of an export of that `kind` to `folder`, and from there to `repo`.

    Of `present`, the card that `repo` has, what people wrote is kept.
    """
    recipe, base, on_hub = trained.recipe, public(trained.recipe.model), not Path(trained.recipe.model).is_dir()
    family, side = trained.family, recipe.extract.source_sample_size
    relation, what = RELATIONS[kind]
    kept, edits = present.data.to_dict() if present else {}, _trained_edits(trained)
    licence = license_of(kept, [family], license)
    ours = licence | _metadata(trained, relation, kept.get("tags") or (), edits=edits, on_hub=on_hub)
    body = rendered(
        "model_card.md",
        title=repo or trained.name,
        what=what,
        trained=trained,
        run=trained.record,
        recipe=recipe,
        lora=recipe.trainable.lora,
        family=family,
        edits=edits,
        kind=kind,
        where=repo or public(str(folder)),
        base=base,
        base_link=f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`",
        source_side=side if side and side**2 != family.vae_area_px else None,
        dtype=dtype,
        losses=_losses(trained),
        scores=[_scores(summary, trained.step) for summary in trained.summaries()],
        images=IMAGES if (trained.output_dir / IMAGES).is_file() else None,
        recipe_yaml=write_yaml(public(as_dict(recipe))),
        license=named_license(licence),
    )
    return ModelCard(renewed(present.text if present else "", ModelCardData(**(kept | ours)), body))


def _metadata(
    trained: Trained, relation: str, tags: Sequence[str], *, edits: bool, on_hub: bool
) -> dict[str, str | list[str]]:
    """What the Hub reads of a card, beside the licence; `tags` that people gave come first."""
    tags = [*tags, "hf_qie", *trained.family.card_tags, *(["lora"] if relation == "adapter" else [])]
    base = {"base_model": trained.recipe.model, "base_model_relation": relation} if on_hub else {}
    task = "image-to-image" if edits else "text-to-image"
    return {"library_name": "diffusers", "tags": list(dict.fromkeys(tags)), "pipeline_tag": task, **base}


def _trained_edits(trained: Trained) -> bool:
    """Whether a run trained edits, or, of a run that left no record, whether its base takes sources."""
    if trained.family.max_sources == 0:
        return False
    groups = trained.record.get("mix")
    return groups is None or any(group["sources"] and group["share"] for group in groups)


def _losses(trained: Trained) -> dict[str, list[tuple[int, float]]]:
    """Each logged loss as (step, value), up to the step of the weights; training before evaluation."""
    logged: dict[str, list[tuple[int, float]]] = {}
    for entry in trained.state["log_history"]:
        for key, value in entry.items():
            of, _, part = key.partition("/")
            if of in LOSSES and entry["step"] <= trained.step:
                name = part if part.startswith("sigma ") else part and f"`{part}`"
                logged.setdefault(", ".join(filter(None, (LOSSES[of], name))), []).append((entry["step"], value))
    return dict(sorted(logged.items(), key=lambda item: item[0].startswith("evaluation")))


def _scores(summary: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A summary of score.py as a table: the base, the best, the last, and the weights of `step`, as far as scored.

    Of data that was not trained on also what each differs by from the base.
    """
    found, data = summary["checkpoints"], summary.get("data")
    last = max(found, key=lambda name: found[name]["step"])
    names = {summary.get("best"), last, *(name for name, one in found.items() if one["step"] in (0, step))}
    shown = {name: one for name, one in found.items() if name in names}
    base = next((one["scores"] for one in found.values() if one["step"] == 0), {})
    lines = []
    for name, score in (KNOWN | FOREIGN).items():
        cells = []
        for one in shown.values():
            value = one["scores"].get(name)
            cell = "" if value is None else f"{value:.3f}"
            if data and value is not None and name in base and one["step"]:
                cell += f" ({value - base[name]:+.3f})"
            cells.append(cell)
        if any(cells):
            lines.append((f"`{name}`" + (f", {score.unit}" if score.unit else ""), cells, score.meaning))
    note = f"{summary['rows']:,} rows of {public(data)}" if data else f"{summary['rows']:,} held-out rows"
    note += "; in brackets what it differs by from the base." if data else "."
    if summary.get("best"):
        note += f" The best by `{summary['metric']}` is {_name(found[summary['best']])}."
    return {"data": data, "names": [_name(one) for one in shown.values()], "lines": lines, "note": note}


def _name(checkpoint: Mapping[str, Any]) -> str:
    return f"step {checkpoint['step']:,}" if checkpoint["step"] else "base"
