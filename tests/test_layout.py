"""The shape of the repository: order of imports, budgets, top level."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_qie"
# Read top to bottom: a module imports only what stands before it.
LAYERS = (
    "errors plots measures.registration measures.edits runtime.rules runtime.yaml_io runtime.files runtime.cli "
    "runtime.ranks runtime.device runtime.ledger runtime.memory_tracker runtime.lock config.training_args config.ema "
    "config.memory config.data config.evaluation config.recipe config.launch runtime.hub_errors models.checkpoint "
    "models.lora_files models.prompts models.base models.denoising models.official models.quantization "
    "models.templates models.prompt_encoder models.image_latents models.tiny_parts models.qwen_image.text_encoder "
    "models.qwen_image.vae models.qwen_image.attention models.qwen_image.transformer models.qwen_image.pipeline "
    "models.qwen_image.tiny models.qwen_image.family models.qwen_image_21.templates models.qwen_image_21.text_encoder "
    "models.qwen_image_21.vae models.qwen_image_21.pieces models.qwen_image_21.packed "
    "models.qwen_image_21.transformer models.qwen_image_21.lora_keys models.qwen_image_21.pipeline "
    "models.qwen_image_21.tiny models.qwen_image_21.family models.judge data.seeding data.schema data.fetch "
    "data.tables data.readers data.samples data.images data.provenance data.embedding_sets hub.dataset_card "
    "hub.redact hub.publish data.mixture data.collate data.online_latents data.loader data.largest extraction.plan "
    "extraction.preprocess extraction.manifest extraction.reuse extraction.estimate extraction.memory "
    "extraction.batching extraction.chunk_writer extraction.set_writer extraction.run extract extraction.firered "
    "convert training.losses training.objective training.fsdp training.offloading training.model training.cost "
    "training.precision training.stand_ins training.forecast training.fit training.metrics training.evaluation "
    "training.held_out_edits training.image_grid training.edit_evaluation training.checkpoints training.ema "
    "training.dcp_reader training.callbacks training.trainer training.sets training.setup train hub.trained_run "
    "hub.export_formats hub.model_card export hub.sampler sampling hub.scoring hub.judging hub.score_report "
    "hub.foreign_rows hub.regression score extraction.stats extraction.contact_sheet extraction.pairs "
    "extraction.first_look extraction.verify check demo.shapes demo.tiny demo.run "
).split()


def functions(tree: ast.AST):
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def path_of(name: str) -> Path:
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def test_every_module_has_its_place():
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    assert {name for name in found if not name.endswith("__init__")} == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_imports_only_what_comes_before_it(name):
    tree = ast.parse(path_of(name).read_text())
    uses = {
        node.module.removeprefix("hf_qie.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_qie.")
    }
    assert uses <= set(LAYERS[: LAYERS.index(name)])


# Rooms on one line never import each other; a room imports itself and what stands below it.
ROOMS = (
    "scripts",
    "demo",
    "hub",
    "extraction training",
    "data",
    "models",
    "config",
    "runtime",
    "errors plots measures",
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms.split()}


@pytest.mark.parametrize("name", LAYERS)
def test_rooms_import_down_only_and_nothing_imports_a_script(name):
    def room(module: str) -> str:
        return "scripts" if "." not in module and module not in FLOOR else module.split(".")[0]

    for node in ast.walk(ast.parse(path_of(name).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_qie."):
            used = node.module.removeprefix("hf_qie.")
            inside = room(used) == room(name) != "scripts"
            assert inside or FLOOR[room(used)] > FLOOR[room(name)], f"{name} imports {used}"


@pytest.mark.parametrize("name", LAYERS)
def test_files_and_functions_stay_readable(name):
    text = path_of(name).read_text()
    assert text.count("\n") <= 320
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(ast.parse(text)) if f.end_lineno - f.lineno >= 45}
    assert not long


LOADS_WEIGHTS = (
    *("QwenImageTransformer2DModel", "AutoencoderKLQwenImage", "vae_class", "full_class"),
    *("QwenImage21Transformer2DModel", "AutoencoderKLQwenImage21", "AutoModelForImageTextToText"),
)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_never_loaded_from_a_pickle(name):
    for call in ast.walk(ast.parse(path_of(name).read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".from_pretrained"):
            loader = ast.unparse(call.func)
            if loader.split(".")[-2] in LOADS_WEIGHTS or "getattr" in loader:
                assert "use_safetensors" in {word.arg for word in call.keywords}, loader


@pytest.mark.parametrize("name", LAYERS)
def test_a_family_is_known_to_its_folder_and_the_registry_alone(name):
    folder = "models.qwen_image"
    imports = [node for node in ast.walk(ast.parse(path_of(name).read_text())) if isinstance(node, ast.ImportFrom)]
    known = any((node.module or "").startswith(f"hf_qie.{folder}") for node in imports)
    assert name.startswith(folder) or not known
