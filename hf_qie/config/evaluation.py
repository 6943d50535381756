"""The sections `sampling` and `evaluation`: images of held-out rows while training, and scores of them."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from hf_qie.config.data import Data
from hf_qie.errors import InputError
from hf_qie.runtime.rules import Count, Name, PathName, Section, Steps, Weight, Whole


class Judge(Section):
    """A vision-language model that scores edits; score.py alone loads it, after the edits are made."""

    model: PathName | None = Field(None, description="Hub id or folder; null: the prompt encoder of the checkpoint")
    revision: Name | None = Field(None, description="of that model")
    adapter: PathName | None = Field(None, description="of that model, made with peft: Hub id or folder")

    @model_validator(mode="after")
    def _check_revision(self) -> Self:
        if self.revision and self.model is None:
            raise ValueError("revision is that of judge.model, which is null; the checkpoint has the recipe's own")
        return self


class Sampling(Section):
    """The image grid while training."""

    every: Whole = Field(0, description="steps; 0: none")
    rows: Count = Field(4, description="held-out rows at fixed seeds")
    num_inference_steps: Steps = 20
    true_cfg_scale: Weight | None = Field(None, description="1: no guidance; null: as the pipeline has it")


class Evaluation(Section):
    """Scores of edits of held-out rows."""

    every: Whole = Field(0, description="steps, a multiple of training.eval_steps; 0: not while training")
    rows: Count = Field(16, description="held-out rows, of each task in turn")
    num_inference_steps: Steps = 20
    true_cfg_scale: Weight | None = Field(None, description="1: no guidance; null: as the pipeline has it")
    regression: Data | None = Field(None, description="rows for score.py --regression, which names their data")
    judge: Judge | None = Field(None, description="also scores by a vision-language model, in score.py; null: none")


def with_evaluation(training: Mapping[str, Any], every: int) -> dict[str, Any]:
    """The section `training`, in which Trainer evaluates at least every `every` steps, if that is not 0.

    Raises InputError where it is told to evaluate at other steps.
    """
    training = dict(training)
    if every:
        strategy = training.setdefault("eval_strategy", "steps")
        if strategy != "steps":
            raise InputError(
                "evaluation.every", f"got {every}, but training.eval_strategy is {strategy}; leave it out"
            )
        steps = training.setdefault("eval_steps", every)
        if every % steps:
            raise InputError("evaluation.every", f"got {every}, expected a multiple of training.eval_steps, {steps:g}")
    return training
