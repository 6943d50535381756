"""The transformer as it trains: all of it, parts of it, or adapters (LoRA) on it; and what of it lies on disk."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from hf_qie.config.recipe import Lora, Recipe
from hf_qie.errors import InputError
from hf_qie.models.base import Family, read_family
from hf_qie.models.checkpoint import checkpoint_folder, read_config, saved_tensors
from hf_qie.models.lora_files import LORA_FILE, PREFIX, UNEVEN, read_lora, write_lora
from hf_qie.models.quantization import load_quantized
from hf_qie.training.fsdp import gathered
from hf_qie.training.offloading import streamed_blocks

logger = get_logger(__name__)

TRANSFORMER_FOLDER = "transformer"
CPU = torch.device("cpu")
MOST_GRAPHS = 64  # of compiled blocks: more than twice what a run with all kinds of passes has


def build_model(
    recipe: Recipe, *, mixed_precision: str = "no", empty: bool = False, device: torch.device = CPU
) -> nn.Module:
    """The transformer of `recipe.model`, on the CPU, with `requires_grad` on what trains.

    What trains is float32; what is frozen is bfloat16 where `mixed_precision` is "bf16", as in the pipeline. An
    `empty` one lies on the meta device: its shapes and what trains, for no memory and in seconds. A base that the
    recipe quantises is so on `device`, and stays there, but for streamed blocks; an empty one is not quantised. Raises
    InputError where the checkpoint does not load or a name of `recipe.trainable` matches nothing.
    """
    set_seed(recipe.seed)  # adapters start equal on all ranks, and in every run of the recipe
    lora, where = recipe.trainable.lora, {"revision": recipe.revision}
    family = read_family(recipe.model, **where)
    quantised = saved_quantised(recipe)
    if quantised and lora is None:
        raise InputError(
            f"trainable: the transformer of {recipe.model!r} is quantised ({quantised.get('quant_method')}), so its "
            "own weights cannot train; set trainable.lora, or name a checkpoint that is not quantised"
        )
    kind = recipe.memory.quantization
    if kind and quantised:
        message = f"got {kind}, but the transformer of {recipe.model!r} is quantised already; leave it out"
        raise InputError("memory.quantization", message)
    half = mixed_precision == "bf16"
    dtype = torch.bfloat16 if lora and half else torch.float32
    model = family.load_transformer(recipe.model, dtype=dtype, empty=empty or kind is not None, **where)
    if kind and not empty:
        _load_quantized(model, recipe, family=family, dtype=dtype, device=device)
    unused = family.without_gradient(model)
    if lora:
        model = _add_lora(model, lora, family, empty=empty)
    else:
        model.requires_grad_(False)
        for parameter in _matching(parameters(model), recipe.trainable.modules, "trainable.modules").values():
            parameter.requires_grad_(True)
    for name, parameter in parameters(model).items():
        if any(_matches(name, part) for part in unused):
            parameter.requires_grad_(False)  # it would stall DDP
        if half and not lora and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"trainable: nothing trains; what {recipe.model!r} has by those names gets no gradient")
    low_lr_parameters(model, recipe.trainable.low_lr_modules)  # a name that matches nothing shows before all else
    return model


def saved_quantised(recipe: Recipe) -> dict[str, Any] | None:
    """How the transformer of the checkpoint was quantised when it was saved; None where it was not."""
    config = read_config(recipe.model, f"{TRANSFORMER_FOLDER}/config.json", revision=recipe.revision)
    return config.get("quantization_config")


def _load_quantized(
    transformer: nn.Module, recipe: Recipe, *, family: Family, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill `transformer` with its checkpoint's weights, quantised on `device`; streamed blocks go to the CPU."""
    folder = checkpoint_folder(recipe.model, [TRANSFORMER_FOLDER], revision=recipe.revision) / TRANSFORMER_FOLDER
    waiting = tuple(f"{name}." for name in streamed_blocks(transformer, recipe.memory.stream_blocks))
    load_quantized(
        transformer,
        saved_tensors(folder),
        recipe.memory.quantization,
        family=family,
        dtype=dtype,
        device=device,
        place=lambda name: CPU if name.startswith(waiting) else device,
    )


def _add_lora(transformer: nn.Module, lora: Lora, family: Family, *, empty: bool) -> PeftModel:
    """`transformer` with adapters, float32 whatever its own dtype; nothing else trains.

    Always peft's own wrapper: with diffusers' `add_adapter` Trainer would save the whole base at every checkpoint.
    """
    names = lora_targets(transformer, lora.target_modules, family.lora_presets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    with warnings.catch_warnings():  # of each quantised layer, that nothing could be merged into it
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without")
        model = get_peft_model(transformer, config)
    if lora.init_from is not None:
        _load_lora(model, lora.init_from, convert=family.convert_lora)  # of an empty one, to see whether it fits
        if not empty:
            logger.info("LoRA: started from %s", lora.init_from)
    return model


def lora_targets(
    transformer: nn.Module, named: str | Sequence[str], presets: Mapping[str, Sequence[str]]
) -> list[str]:
    """Full names of the linear layers that a preset, or a list of last parts of names, stands for."""
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    matched = set()
    for part in presets[named] if isinstance(named, str) else named:
        found = {name for name in layers if f".{name}".endswith(f".{part}")}
        if not found:
            raise InputError(
                f"trainable.lora.target_modules: {part!r} is not the end of any linear layer's name; "
                f"there are {', '.join(presets['all-linear'])}, and the presets {', '.join(presets)}"
            )
        matched |= found
    return sorted(matched)


def low_lr_parameters(model: nn.Module, modules: Sequence[str]) -> list[nn.Parameter]:
    """What trains at half the rate. Raises InputError for a name that matches nothing that trains."""
    trainable = {name: parameter for name, parameter in parameters(model).items() if parameter.requires_grad}
    return list(_matching(trainable, modules, "trainable.low_lr_modules").values())


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the transformer's own names, whatever wraps it or its blocks."""
    return {
        name.removeprefix("base_model.model.").replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
    }


def _matching(named: Mapping[str, nn.Parameter], parts: Iterable[str], field: str) -> dict[str, nn.Parameter]:
    """Those of `named` that some part matches; InputError for a part that matches none of them."""
    found: dict[str, nn.Parameter] = {}
    for part in parts:
        hits = {name: one for name, one in named.items() if _matches(name, part)}
        if not hits:
            some = sorted({name.split(".")[0] for name in named})
            raise InputError(
                f"{field}: {part!r} matches no parameter that could train; it must be whole parts of a dotted name "
                f"below {', '.join(some)}, as 'transformer_blocks.0.attn'"
            )
        found |= hits
    return found


def _matches(name: str, part: str) -> bool:
    """True where the components of `part` occur side by side in the dotted `name`; "." matches all."""
    return part == "." or f".{part}." in f".{name}."


def base_of(model: nn.Module) -> nn.Module:
    """The transformer without peft's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def compile_blocks(transformer: nn.Module, **how: Any) -> None:
    """Compile the blocks of `transformer`: all are alike, so that it takes a sixtieth of the time of the whole.

    They share their graphs. A graph stands for one kind of pass: with or without gradients and adapters that train,
    prompts of one length or of several, and whether the input of the block needs a gradient; and, torch's default, for
    the first shape alone and then for any. Attention by row lies between graphs, as lengths would each make new ones.
    Behind torch's limit of 8 a block would run as it is, with no more than a warning.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    transformer.compile_repeated_blocks(**how)


# --- weights on disk -------------------------------------------------------------------------------------------------


def save_weights(
    model: nn.Module, folder: str | Path, *, writes: bool = True, dtype: torch.dtype | None = None
) -> None:
    """Write what trains as diffusers loads it: `pytorch_lora_weights.safetensors`, or the folder `transformer/`.

    `dtype`: of the transformer, if not its own. Every rank of a sharded model calls it; the others do not write.
    """
    lora = isinstance(model, PeftModel)
    tensors = gathered(adapters(model) if lora else parameters(model), keep=writes, dtype=None if lora else dtype)
    if not writes:
        return
    if lora:
        config = model.peft_config["default"]
        settings = {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        settings["target_modules"] = sorted(config.target_modules)
        write_lora(folder, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, settings)
    else:
        with init_empty_weights():
            whole = type(model).from_config(model.config)
        whole.load_state_dict(tensors, assign=True)
        whole.save_pretrained(Path(folder) / TRANSFORMER_FOLDER)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Read back, bit for bit, what `save_weights` wrote; raises InputError where it is not all of the model."""
    if isinstance(model, PeftModel):
        _load_lora(model, Path(folder) / LORA_FILE, convert=dict)
        return
    unmatched = set(model.state_dict())
    for path in sorted((Path(folder) / TRANSFORMER_FOLDER).glob("*.safetensors")):
        tensors = load_file(path)
        model.load_state_dict(tensors, strict=False)  # one shard at a time; together they are all of it
        unmatched ^= tensors.keys()
    if unmatched:
        raise InputError(f"{folder}: {min(unmatched)} is in it or in the model alone; take another checkpoint")


def adapters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The adapter's own parameters by the keys that diffusers gives them in a file."""
    found = {name: parameter for name, parameter in parameters(model).items() if ".lora_" in name}
    return {PREFIX + name.replace(".default.", "."): parameter for name, parameter in found.items()}


def _load_lora(model: PeftModel, source: str | Path, *, convert: Any) -> None:
    """Fill the adapters from a LoRA file, a folder with one, or a Hub id, in any layout that `read_lora` knows.

    Raises InputError unless all of it is taken, and its layers, rank and alpha are those of `model`.
    """
    where = f"trainable.lora: {source}"
    tensors, metadata = read_lora(source, where=where, convert=convert)
    wanted, config = adapters(model), model.peft_config["default"]
    expected = {key: parameter.shape for key, parameter in wanted.items()}
    found = {key: tensor.is_floating_point() and tensor.shape for key, tensor in tensors.items()}
    layers = {name.replace("_checkpoint_wrapped_module.", "") for name, _ in base_of(model).named_modules()}
    if foreign := sorted({key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors} - layers):
        raise InputError(f"{where} has adapters on {foreign[0]}, which the model lacks; is it of another model?")
    if misfits := sorted(key for key in wanted.keys() | tensors.keys() if expected.get(key) != found.get(key)):
        raise InputError(
            f"{where} is not a LoRA of rank {config.r} on the layers that the recipe names: {len(misfits)} tensors "
            f"differ, the first is {misfits[0]}; set trainable.lora.rank and .target_modules to those of the file"
        )
    settings = {key.removeprefix(PREFIX): value for key, value in (metadata or {}).items()}
    if uneven := [key for key in UNEVEN if settings.get(key)]:
        raise InputError(f"{where} was trained with {uneven[0]}, which trainable.lora does not have; take another one")
    alpha = settings.get("lora_alpha", config.r)  # without metadata diffusers takes alpha = rank
    if alpha != config.lora_alpha:
        raise InputError(
            f"{where} has alpha {alpha:g}, the recipe {config.lora_alpha:g}; set trainable.lora.alpha: {alpha:g}"
        )
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])
