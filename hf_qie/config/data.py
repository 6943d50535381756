"""Rows of images and captions in the recipe: where they are, and which of their columns mean what."""

from typing import Annotated, Any

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from hf_qie.runtime.rules import Listed, Name, Names, One, PathName, Section, rule

# An embedding set has these columns of its own, and text_embeds_drop.
SET_COLUMNS = {"row", "source_image", "target_image", "num_sources", "image_embeds", "target_latents", "target_grid"}
SET_COLUMNS |= {"source_latents", "source_grids", "prefix_embeds", "image_slots", "drop"}
CaptionNames = Annotated[
    tuple[Name, ...],
    Listed,
    One,
    rule(
        f"a list of different column names, none of them {', '.join(sorted(SET_COLUMNS))}",
        lambda names: len(set(names)) == len(names) and SET_COLUMNS.isdisjoint(names),
    ),
]
Paths = Annotated[tuple[PathName, ...], Listed, One]


def _inverse_captions(given: dict[str, Any]) -> tuple[str, ...]:
    return ("inverse_instruction", "inverse_instruction_cn")[: len(given["captions"])]


class Columns(Section):
    """Which columns of a task's data mean what."""

    sources: Name | Names = Field("source_image", description="null, a path, a URL, an image, or a list of them")
    target: Name = "target_image"
    captions: CaptionNames = ("instruction", "instruction_cn")
    inverse_captions: CaptionNames = Field(default_factory=_inverse_captions, description="i-th: inverse of the i-th")

    @property
    def required(self) -> tuple[str, ...]:
        """The captions that the recipe names; each must occur in the data."""
        named = [key for key in ("captions", "inverse_captions") if key in self.model_fields_set]
        return tuple(column for key in named for column in getattr(self, key))


class Data(Section):
    """Rows to edit, of whatever kind data/readers.py reads."""

    name: SkipJsonSchema[str] = Field("", exclude=True)
    data: Paths = Field((), description="files, globs, a folder of save_to_disk, or a Hub id; none with embeddings")
    split: Name = "train"
    image_root: PathName | None = Field(None, description="relative image paths start here; null: the folder of data")
    columns: Columns = Field(default_factory=Columns)
