"""Scores of edits by a vision-language model, once the edits are made: a third file of a row, beside its image.

A row is judged again only if its edit, the judge or a question has changed.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from PIL import Image
from tqdm import tqdm

from hf_qie.hub.scoring import Candidate, Scorer, digest, read_made_with
from hf_qie.models.judge import EditJudge, questions_digest
from hf_qie.runtime.files import write_durably
from hf_qie.training.held_out_edits import rgb

logger = logging.getLogger("hf_qie.score")

LEAST_MASS = 0.5  # of a judge's probability on the answers; with less it would rather say something else


def judge_edits(scorer: Scorer, chosen: Sequence[Candidate], judge: EditJudge) -> set[str]:
    """Judge every edit that is not judged yet, shared among the ranks; the candidates that had such rows.

    The transformer gives its memory back before the judge is loaded.
    """
    state = scorer.state
    jobs = broadcast_object_list([_jobs(scorer, chosen, judge) if state.is_main_process else None])[0]
    mine, by_name = jobs[state.process_index :: state.num_processes], {one.name: one for one in chosen}
    scorer.release()
    for name, number, made_with in tqdm(mine, "judging", unit="edit", disable=None if state.is_main_process else True):
        _, *sources = scorer.edits.images(number)
        with Image.open(scorer.path(by_name[name], number).with_suffix(".png")) as output:
            images = [Image.fromarray(rgb(image)) for image in (*sources, output)]
        scores = judge(scorer.edits.instruction(number), images[:-1], images[-1])
        text = json.dumps({"scores": scores, "made_with": made_with}, indent=2, allow_nan=False)
        write_durably(scorer.path(by_name[name], number, judged=True), text)
    state.wait_for_everyone()
    if state.is_main_process:
        _warn_of_little_mass(scorer, chosen, judge)
    return {name for name, *_ in jobs}


def _jobs(scorer: Scorer, chosen: Sequence[Candidate], judge: EditJudge) -> list[tuple[str, int, dict[str, Any]]]:
    """(candidate, number, made_with) of the rows to judge: those without a file, or made with other values."""
    jobs, known = (
        [],
        {
            "judge": digest(judge.files),
            "questions": questions_digest(),
            "arithmetic": str(judge.dtype).removeprefix("torch."),
        },
    )
    for candidate in chosen:
        changed: set[str] = set()
        for number, row in zip(scorer.numbers, scorer.rows(candidate, judged=False), strict=True):
            edit = hashlib.sha256(json.dumps(row["made_with"]).encode()).hexdigest()
            was, made_with = read_made_with(scorer.path(candidate, number, judged=True)), {"edit": edit, **known}
            if was != made_with:
                jobs.append((candidate.name, number, made_with))
                changed |= {key for key in was if was[key] != made_with.get(key)}
        if changed:
            logger.info("%s: judged again, with another %s", candidate.name, ", ".join(sorted(changed)))
    return jobs


def _warn_of_little_mass(scorer: Scorer, chosen: Sequence[Candidate], judge: EditJudge) -> None:
    masses = [row["scores"]["judge_mass"] for one in chosen for row in scorer.rows(one)]
    if (mean := math.fsum(masses) / len(masses)) < LEAST_MASS:
        logger.warning(
            "evaluation.judge: %s puts %.2g of its probability on the digits that it is asked for: it does not answer "
            "the questions, and its scores mean little",
            *(judge.name, mean),
        )
