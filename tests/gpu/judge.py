"""How far the judge of edits agrees with people, on a public bench whose rows and weights are at hand.

    python tests/gpu/judge.py EditScore/EditReward-Bench --checkpoint Qwen/Qwen-Image-Edit-2509
        [--model org/name] [--revision name] [--adapter org/name]
        [--split train] [--instruction instruction] [--source input_image] [--outputs output_images]
        [--dimension dimension] [--people column] [--rows n]

The bench is a dataset by Hub id, or a folder that load_dataset reads; the defaults are the columns of
EditScore/EditReward-Bench, whose first output is the one that people prefer. --people: a column with their scores,
one for each output; then the order of outputs is theirs, and Spearman's correlation is given too. --outputs: a column
with an image or a list of them. --dimension: a column that says what people judged: prompt_following is compared with
judge_followed, consistency with judge_preserved, all else, and a bench without that column, with judge.

It is no step of `make gpu`, which reads no weights. On the CPU it runs too, in days.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, permutations
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[:1] = [str(Path(__file__).resolve().parents[2])]

from datasets import load_dataset
from PIL import Image
from scipy.stats import spearmanr
from tqdm import tqdm

from hf_qie.config.evaluation import Judge
from hf_qie.models.judge import EditJudge
from hf_qie.runtime.device import own_device

COMPARED = {"prompt_following": "judge_followed", "consistency": "judge_preserved"}
Judged = tuple[str, Sequence[float], Sequence[float]]  # dimension; of each output, what people and the judge give


def main(argv: Sequence[str]) -> dict[str, dict[str, float]]:
    """Print the figures of each dimension, and return them."""
    given = parse(argv)
    settings = Judge(model=given.model, revision=given.revision, adapter=given.adapter)
    judge = EditJudge(settings, checkpoint=given.checkpoint, revision=None, device=own_device())
    rows = load_dataset(given.bench, split=given.split)
    rows = rows.select(range(min(given.rows or len(rows), len(rows))))
    found = agreement(judged(judge, tqdm(rows, "judging", unit="row"), given))
    print(json.dumps(found, indent=2))
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench")
    parser.add_argument("--checkpoint", default="Qwen/Qwen-Image-Edit-2509")
    for name in ("model", "revision", "adapter", "people"):
        parser.add_argument(f"--{name}")
    columns = {"split": "train", "instruction": "instruction", "source": "input_image", "outputs": "output_images"}
    for name, default in (columns | {"dimension": "dimension"}).items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--rows", type=int)
    return parser.parse_args(argv)


def judged(judge: EditJudge, rows: Iterable[Mapping[str, Any]], given: argparse.Namespace) -> Iterable[Judged]:
    """Each row with the scores of people and of the judge; an edit that several rows have is judged once."""
    known: dict[str, dict[str, float]] = {}
    for row in rows:
        dimension, source = row.get(given.dimension) or "overall", row[given.source].convert("RGB")
        outputs, scores = [image.convert("RGB") for image in listed(row[given.outputs])], []
        for output in outputs:
            key = digest(row[given.instruction], source, output)
            if key not in known:
                known[key] = judge(row[given.instruction], [source], output)
            scores.append(known[key][COMPARED.get(dimension, "judge")])
        preferred = [1.0, *[0.0] * (len(outputs) - 1)]
        yield dimension, listed(row[given.people]) if given.people else preferred, scores


def agreement(rows: Iterable[Judged]) -> dict[str, dict[str, float]]:
    """By dimension: of pairs of outputs that people order, the share that the judge orders so; and Spearman's rho.

    A pair that the judge finds equal is not ordered. Rho is over all outputs; of rows in which people only prefer one
    it says little.
    """
    by_dimension: dict[str, list[tuple[Sequence[float], Sequence[float]]]] = {}
    for dimension, people, scores in rows:
        by_dimension.setdefault(dimension, []).append((people, scores))
    found = {}
    for dimension, some in by_dimension.items():
        ordered = [
            one[1] > other[1]
            for people, scores in some
            for one, other in permutations(zip(people, scores, strict=True), 2)
            if one[0] > other[0]
        ]
        all_people, all_scores = (list(chain.from_iterable(lists)) for lists in zip(*some, strict=True))
        found[dimension] = {
            "rows": len(some),
            "pairs": len(ordered),
            "accuracy": sum(ordered) / max(len(ordered), 1),
            "spearman": float(spearmanr(all_people, all_scores).statistic),
        }
    return found


def listed(value: Any) -> list[Any]:
    """A value of a column that has one a row, or a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def digest(instruction: str, *images: Image.Image) -> str:
    """Of an edit."""
    found = hashlib.sha256(instruction.encode())
    for image in images:
        found.update(repr(image.size).encode() + image.tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
