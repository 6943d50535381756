"""The tiny checkpoint stands in for the real one, and the synthetic edits mean what they say."""

import pytest
from diffusers import DiffusionPipeline

from hf_qie.tiny import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_in_its_official_pipeline(tiny, kind):
    assert type(DiffusionPipeline.from_pretrained(tiny(kind))) is KINDS[kind]
