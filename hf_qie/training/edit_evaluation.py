"""Scores of edits while training, among the metrics of evaluation: the best checkpoint may be chosen by them."""

import math

from accelerate.utils import broadcast_object_list
from transformers import EvalPrediction, Trainer

from hf_qie.errors import InputError
from hf_qie.training.evaluation import score_of_metric, spread
from hf_qie.training.held_out_edits import HeldOutEdits


class EditEvaluation:
    """Trainer's `compute_metrics`: the losses of held-out rows, and every `evaluation.every` steps scores of edits.

    Trainer logs them as `eval_<score>` and `eval_<score>/<task>`, in one entry with the losses. They are the same for
    any number of ranks, and training is the same with and without them.
    """

    def __init__(self, trainer: Trainer, edits: HeldOutEdits):
        """`trainer` is an EditTrainer with held-out rows; of its ranks the first decodes, and has `edits.vae`.

        Raises InputError, on that rank, where no row has the score that is `training.metric_for_best_model`.
        """
        self.trainer, self.edits, self.settings = trainer, edits, trainer.recipe.evaluation
        self.numbers, self.metric = spread(edits.held_out, self.settings.rows), score_of_metric(trainer.recipe)
        if not (self.metric and trainer.is_world_process_zero()):
            return
        if self.metric not in (found := edits.of_targets(self.numbers)):
            raise InputError(
                f"training.metric_for_best_model: {self.metric!r} is not defined for any of the {len(self.numbers)} "
                f"rows that are evaluated, which have {', '.join(found)}"
            )

    def __call__(self, gathered: EvalPrediction) -> dict[str, float]:
        """The metrics of this step."""
        metrics = self.edits.held_out.metrics(gathered)
        return metrics | (self.scores() if self.trainer.state.global_step % self.settings.every == 0 else {})

    def scores(self) -> dict[str, float]:
        """The figures of the model as it is, on every rank."""
        edits, found = self.edits, [None]
        latents = edits.shared(self.trainer.model, self.numbers, self.settings)
        if self.trainer.is_world_process_zero():
            made = [edits.vae.decode(*one) for one in latents]
            found = [edits.figures(self.numbers, list(map(edits.score, self.numbers, made)))]
        (figures,) = broadcast_object_list(found)
        # what cannot be measured of these edits is no best, and Trainer expects a number
        return figures | ({self.metric: math.nan} if self.metric and self.metric not in figures else {})
