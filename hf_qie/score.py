"""Scores of checkpoints: held-out rows are edited by the base and by checkpoints of a run, and compared with their
targets.

    accelerate launch [-q] hf_qie/score.py recipe.yaml [key.of.the.recipe=value ...]
        [--checkpoint N ...] [--all] [--base] [--keep_best] [--regression DATA]

Without an option, the base and the last weights of training.output_dir are scored, those that sampling.py uses.
--checkpoint: checkpoint-N alone; it may be given several times. --all: the base and every checkpoint. --base: the base
alone, or beside --checkpoint. --keep_best: --all, and then the weights of the best checkpoint in
<output_dir>/best, which export.py and sampling.py take; no checkpoint is deleted. The best is that of
training.metric_for_best_model if this is a score, else of edit_score.

The rows are the first evaluation.rows of those that tasks.<name>.eval_rows holds out, as in evaluation while training,
whose scores at a step are the same. In <output_dir>/evaluation: scores.jsonl, a line for each row and checkpoint;
summary.json, their means; <checkpoint>.png, a sheet with source, output, target and difference;
<checkpoint>/<task>-<row>.png, the edits. Started again, it resumes: a row is scored again only if something that it
depends on has changed. Ranks share the rows; each has the whole model.

With evaluation.judge, a vision-language model judges the edits too, once all are made and the transformer has given
its memory back: <checkpoint>/<task>-<row>.judge.json. Training never loads it.

--regression: not the held-out rows, but evaluation.rows rows of DATA, files or a dataset of the Hub as `data` of a
task: what did training do to other edits? evaluation.regression names split and columns, and of a row without target
the output is compared with its source. The base is always among the candidates, and what a checkpoint makes is also
compared with what the base makes. All is in <output_dir>/evaluation/regression/<name of the data>.
"""

import json
import os
from argparse import Namespace
from pathlib import Path

from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.runtime.cli import Options, checked, run_script
from hf_qie.runtime.rules import Count


def main(argv: list[str]) -> None:
    """Score what the options name."""
    given = parse_arguments(argv)
    recipe = load_recipe(given.recipe, given.overrides)
    if not given.regression and not any(task.eval_rows for task in recipe.tasks.values()):
        raise InputError(f"{recipe.path}: no task holds out rows to score; set tasks.<name>.eval_rows and train again")
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: on a CPU the number of threads is in the last bit
    from accelerate import PartialState

    from hf_qie.hub.judging import judge_edits
    from hf_qie.hub.regression import Regression, regression_report
    from hf_qie.hub.score_report import keep_best, report, track
    from hf_qie.hub.scoring import EVALUATION, Scorer, candidates, scoring_arguments
    from hf_qie.models.judge import EditJudge
    from hf_qie.runtime.lock import held

    arguments = scoring_arguments(recipe)
    output_dir = Path(arguments.output_dir)
    chosen = candidates(output_dir, base=given.base, steps=given.checkpoint, every=given.all)
    with held(output_dir / EVALUATION, remedy="give another training.output_dir"):
        scorer, judge = (Regression if given.regression else Scorer)(recipe, arguments), None
        if (settings := recipe.evaluation.judge) is not None:
            judge = EditJudge(settings, checkpoint=recipe.model, revision=recipe.revision, device=arguments.device)
        new = scorer.run(chosen)
        if judge is not None:
            new |= judge_edits(scorer, chosen, judge)
        if PartialState().is_main_process:
            figures = (regression_report if given.regression else report)(scorer, chosen)
            prefix = "regression_" if given.regression else "eval_"
            track(arguments, {one.step: figures[one.name] for one in chosen if one.name in new}, prefix=prefix)
            if given.keep_best:
                keep_best(recipe, chosen, figures)


def parse_arguments(argv: list[str]) -> Namespace:
    """The command line; raises InputError."""
    parser = Options()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--checkpoint", type=checked(Count), action="append", default=[])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--base", action="store_true")
    parser.add_argument("--keep_best", action="store_true")
    parser.add_argument("--regression", metavar="DATA")
    given = parser.parse_intermixed_args(argv)
    if given.regression:
        if given.keep_best:
            raise InputError("--keep_best: goes by the scores of held-out rows; leave --regression out")
        given.overrides.append(f"evaluation.regression.data={json.dumps(given.regression)}")
        given.base |= bool(given.checkpoint)
    given.all |= given.keep_best
    if given.all and given.checkpoint:
        raise InputError("--checkpoint: --all has every checkpoint; leave one of them out")
    return given


if __name__ == "__main__":
    run_script(main)
