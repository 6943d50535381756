"""What extraction takes on a device at its peak, from headers, captions and configs, before a weight is read.

Encoder and VAE share the device and run in turn. What no count of tensors sees, as kernel workspaces, comes on top.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from hf_qie.config.recipe import Recipe
from hf_qie.data.schema import SOURCES, TARGET
from hf_qie.errors import InputError
from hf_qie.extraction.estimate import Outlook, Row, sample
from hf_qie.extraction.plan import Plan, family_of_recipe, make_plan, open_processor, own_tasks
from hf_qie.models.base import Size
from hf_qie.models.prompts import Prompt
from hf_qie.runtime.device import AUTO
from hf_qie.runtime.memory_tracker import UNSEEN_BYTES, UNSEEN_SHARE


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes on one device."""

    encoder_weights: int
    encoder_least: int  # of them, with all layers that can be in CPU memory there
    encoder_activations: int
    vae_weights: int = 0
    vae_activations: int = 0

    @property
    def activations(self) -> int:
        """At the peak."""
        return max(self.encoder_activations, self.vae_activations)

    @property
    def peak(self) -> int:
        """With all weights on the device."""
        return self.encoder_weights + self.vae_weights + self.activations

    def needed(self, encoder_weights: int) -> int:
        """What has to be free for that much of the encoder."""
        return math.ceil((encoder_weights + self.vae_weights + self.activations) * (1 + UNSEEN_SHARE)) + UNSEEN_BYTES

    def fits(self, free: int) -> bool:
        """Whether everything fits into `free` bytes."""
        return self.needed(self.encoder_weights) <= free

    def room(self, free: int, device: torch.device) -> int:
        """How much of the encoder's weights fits into `free` bytes of `device`; raises InputError if too little."""
        if (needed := self.needed(self.encoder_least)) > free:
            key, of = "batch_size", "encoder"
            if self.vae_activations > self.encoder_activations:
                key, of = "vae_batch_size", "VAE"
            raise InputError(
                f"extract: at least {gb(needed)} have to be free on {device}, with all layers of the encoder in CPU "
                f"memory, and {gb(free)} are; {gb(self.activations)} are activations of the {of}: "
                f"lower extract.{key}, or, if it is 1, use a device with more memory"
            )
        room = int((free - UNSEEN_BYTES) / (1 + UNSEEN_SHARE)) - self.vae_weights - self.activations
        return max(room, self.encoder_least)  # which rounding may pass by a byte

    def __str__(self) -> str:
        parts = {"encoder": (self.encoder_weights, self.encoder_activations)}
        if self.vae_weights:
            parts["VAE"] = self.vae_weights, self.vae_activations
        each = "; ".join(f"{name} {gb(a)} of weights, {gb(b)} of activations" for name, (a, b) in parts.items())
        return (
            f"forecast memory of extraction: {each}; peak {gb(self.peak)}, as both run in turn; "
            f"with less than {gb(self.needed(self.encoder_weights))} free, layers of the encoder wait in CPU memory"
        )


def forecast_gpu(recipe: Recipe) -> Forecast:
    """For all tasks of a recipe that have data, on a GPU; its `auto` dtype is bfloat16. Raises InputError."""
    family, tasks = family_of_recipe(recipe), own_tasks(recipe)
    processor = open_processor(recipe, family)
    dtype = torch.bfloat16 if recipe.extract.dtype == AUTO else getattr(torch, recipe.extract.dtype)
    with TemporaryDirectory(prefix="hf_qie-rows-") as folder:
        plans = {name: make_plan(recipe, task, family, Path(folder)) for name, task in tasks.items()}
        return forecast(plans, processor, dtype=dtype)


def forecast(plans: Mapping[str, Plan], processor: Any, *, dtype: torch.dtype) -> Forecast:
    """For batches that are as large as the largest of a sample of all tasks' rows."""
    samples = [(plan, row, look) for plan in plans.values() for row, look in sample(plan, processor)]
    good = [one for one in samples if isinstance(one[2], Outlook)]
    plan = next(iter(plans.values()))
    family, extract = plan.family, plan.extract
    where = {"revision": plan.recipe.revision, "dtype": dtype}
    prompts = [family.make_prompt(processor, [], [extract.drop_caption])]
    for number in ("num_encoded", "num_image_tokens") if good else ():
        prompts += prompts_of(*max(good, key=lambda one, number=number: getattr(one[2], number)), processor)
    encoder = family.encoder_memory(plan.recipe.model, prompts=[largest(prompts)], **where)
    found = {"encoder_weights": encoder.weights, "encoder_least": encoder.least_weights}
    found |= {"encoder_activations": extract.batch_size * encoder.activations}  # all tensors grow with the batch
    if extract.latents:
        size = max((largest_image(plan, look) for plan, _, look in good), key=math.prod, default=(32, 32))
        vae = family.vae_memory(plan.recipe.model, size=size, batch_size=extract.vae_batch_size, **where)
        found |= {"vae_weights": vae.weights, "vae_activations": vae.activations}
    return Forecast(**found)


def largest(prompts: Sequence[Prompt]) -> Prompt:
    """The most images that one prompt has, with as many tokens as the longest has: none of `prompts` takes more.

    Images take memory in the vision part and text in the language model, so that neither alone says which takes most.
    """
    most_images = max(prompts, key=lambda one: sum(map(len, one.vision.values())))
    more = max(one.num_tokens for one in prompts) - most_images.num_tokens
    *branches, last = most_images.branches
    return replace(most_images, branches=[*branches, last + last[-1:] * more])


def prompts_of(plan: Plan, row: Row, look: Outlook, processor: Any) -> list[Prompt]:
    """The prompts of a row, over blank images of the sizes that the encoder sees."""
    sizes = {
        name: [plan.family.fit(one.size, plan.family.vlm_area_px) for one in of] for name, of in look.headers.items()
    }
    shown = {name: [Image.new(plan.family.image_mode, size) for size in some] for name, some in sizes.items()}
    return [
        plan.family.make_prompt(processor, shown[TARGET if prefix else SOURCES], list(texts.values()))
        for prefix, _, texts in plan.ways(row)
    ]


def largest_image(plan: Plan, look: Outlook) -> Size:
    """The largest image of a row that the VAE sees."""
    areas = [plan.target_area_px, *([plan.source_area_px] if look.headers[SOURCES] else [])]
    sizes = [plan.family.fit(header.size, max(areas)) for some in look.headers.values() for header in some]
    return max(sizes, key=math.prod)


def gb(num_bytes: int) -> str:
    """In GB, 10^9 bytes."""
    return f"{num_bytes / 1e9:,.1f} GB"
