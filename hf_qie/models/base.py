"""What hf_qie asks of a family of models. A family is one folder beside this module and its lines in `FAMILIES`."""

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from pkgutil import resolve_name

from hf_qie.errors import InputError
from hf_qie.models.checkpoint import read_config

# By the pipeline class that a checkpoint's model_index.json names; imported when a checkpoint needs it.
FAMILIES = {
    "QwenImageEditPlusPipeline": "hf_qie.models.qwen_image.family:EDIT_PLUS",
    "QwenImageEditPipeline": "hf_qie.models.qwen_image.family:EDIT",
    "QwenImagePipeline": "hf_qie.models.qwen_image.family:TEXT_TO_IMAGE",
}


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """What a checkpoint's pipeline does to its inputs; areas are those of `calculate_dimensions`."""

    pipeline: str  # name of the class in diffusers
    max_sources: int | None  # None: any number; 0: text-to-image alone
    vlm_area_px: int  # what the prompt encoder sees of a source
    vae_area_px: int  # what the VAE sees of a source

    unsupported: tuple[str, ...] = ()  # flags of a transformer's config that we do not train

    @property
    def one_resize(self) -> bool:
        """True where the pipeline hands one resized image to both encoder and VAE."""
        return self.vlm_area_px == self.vae_area_px

    def source_area_px(self, source_sample_size: int | None) -> int:
        """Area that the VAE sees of a source; raises InputError where the family allows no other."""
        if source_sample_size is None:
            return self.vae_area_px
        if self.one_resize and source_sample_size**2 != self.vae_area_px:
            hands = f"hands one image of {self.vae_area_px:,} pixels to encoder and VAE"
            raise InputError(
                f"extract.source_sample_size: {source_sample_size}: {self.pipeline} "
                f"{'takes no sources' if self.max_sources == 0 else hands}; leave it null"
            )
        return source_sample_size**2


def families() -> Iterator[Family]:
    """All that are registered."""
    return map(resolve_name, FAMILIES.values())


def read_family(model: str, *, revision: str | None = None) -> Family:
    """The family of a checkpoint, by the pipeline class in its `model_index.json`.

    Raises InputError for a pipeline, or a transformer, that we do not train.
    """
    pipeline = read_config(model, "model_index.json", revision=revision).get("_class_name")
    if pipeline not in FAMILIES:
        raise InputError(f"model: {model} is a {pipeline}; hf_qie trains {', '.join(FAMILIES)}")
    family: Family = resolve_name(FAMILIES[pipeline])
    transformer = read_config(model, "transformer/config.json", revision=revision)
    for flag in family.unsupported:
        if transformer.get(flag):
            raise InputError(f"model: the transformer of {model} has {flag}, which hf_qie does not train")
    return family
