"""RUN 1: edit pairs to embedding sets.

    accelerate launch [-q] hf_qie/extract.py recipe.yaml [key.of.the.recipe=value ...]

Runs the prompt encoder and the VAE once over every task of the recipe and leaves one embedding set a task under
extract.output_dir; open one with datasets.load_from_disk. With extract.push_to_hub the sets are then published.
Started again, it resumes at the chunks that are missing; several launches of one recipe share them.
Exit codes: 0, 3 (more bad rows than extract.max_bad_share; the good ones are kept), 1 (anything else); `accelerate
launch` itself makes 1 of all but 0.
"""

import os

from hf_qie.config.recipe import load_recipe
from hf_qie.runtime.cli import logged_from_any_rank, run_script
from hf_qie.runtime.ranks import rank


def main(argv: list[str]) -> int:
    """Extract every task of the recipe that has data; returns the exit code."""
    recipe = load_recipe(argv[0], argv[1:])
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: it sets the threads that torch starts
    from hf_qie.extraction.run import extract
    from hf_qie.hub.publish import open_repo, push_unless_bad

    if recipe.extract.push_to_hub and rank() == 0:
        open_repo(recipe.extract)  # finds out before the work whether the sets can be published
    code, is_last = extract(recipe)
    if recipe.extract.push_to_hub and is_last:
        with logged_from_any_rank():
            push_unless_bad(recipe, code)
    return code


if __name__ == "__main__":
    run_script(main)
