"""Embeddings that FireRed-Image-Edit extracted to embedding sets; no model is run.

    python hf_qie/convert.py recipe.yaml [key.of.the.recipe=value ...] [--empty_text null_text_embedding.pt]

tasks.<name>.data names the JSONL files that its extraction wrote, whose rows name `.pt` files, and
tasks.<name>.columns.target their target, `edit_image`. Leaves one set a task under extract.output_dir, as
hf_qie/extract.py does. Such files hold no latents: training reads the images, in the sizes of this recipe, and
encodes them. Nor do they say how they were computed: training takes them with a warning.
--empty_text: the embeddings of the empty text, for rows without images, which name none.
Started again, it resumes.
Exit codes: 0, 3 (more bad rows than extract.max_bad_share; the good ones are kept), 1 (anything else).
"""

import tempfile
from pathlib import Path

from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.runtime.cli import Options, run_script
from hf_qie.runtime.ranks import world_size


def main(argv: list[str]) -> int:
    """Convert every task of the recipe that has data; returns the exit code."""
    parser = Options()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--empty_text", type=Path)
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    recipe = recipe.model_copy(update={"extract": recipe.extract.model_copy(update={"latents": False})})
    if arguments.empty_text and not arguments.empty_text.is_file():
        raise InputError(f"--empty_text: {arguments.empty_text} not found")
    if world_size() > 1:
        raise InputError("hf_qie/convert.py: runs no model and is one process; start it with python")
    from hf_qie.extraction.firered import convert_task, open_foreign
    from hf_qie.extraction.plan import family_of_recipe, make_plan, own_tasks
    from hf_qie.extraction.run import are_finished, check_disk, exit_code
    from hf_qie.hub.publish import open_repo, push_unless_bad

    family, sources = family_of_recipe(recipe), []
    with tempfile.TemporaryDirectory(prefix="hf_qie-rows-") as name:
        for task in own_tasks(recipe).values():
            plan = make_plan(recipe, task, family, Path(name), refuse=True)
            sources.append(open_foreign(plan, Path(name), empty_text=arguments.empty_text))
    if recipe.extract.push_to_hub:
        open_repo(recipe.extract)  # finds out before the work whether the sets can be published
    check_disk({source.plan.task.name: source.plan for source in sources})
    for source in sources:
        convert_task(source)
    code = exit_code(recipe)
    if recipe.extract.push_to_hub and are_finished(source.plan.folder for source in sources):
        push_unless_bad(recipe, code)
    return code


if __name__ == "__main__":
    run_script(main)
