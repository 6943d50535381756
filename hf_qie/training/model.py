"""The transformer that trains: all of it, parts of it, or adapters (LoRA) on it. What is odd about it stays here.

Letters: B rows, S target tokens, R source tokens, L prompt tokens, D prompt width.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_qie.config.recipe import Lora, Recipe
from hf_qie.data.collate import Batch
from hf_qie.errors import InputError
from hf_qie.models.qwen_image.lora_files import UNEVEN, read_lora
from hf_qie.training.fsdp import gathered

logger = get_logger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for it
TRANSFORMER_FOLDER = "transformer"

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MLP = ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]
BLOCK_MODULATION = ["img_mod.1", "txt_mod.1"]
TIME = ["timestep_embedder.linear_1", "timestep_embedder.linear_2"]
OUTER = ["img_in", "txt_in", *TIME, "norm_out.linear", "proj_out"]
PRESETS = {
    "attention": ATTENTION,
    "attention+mlp": ATTENTION + MLP,
    "all-linear": ATTENTION + MLP + BLOCK_MODULATION + OUTER,
}


# --- building --------------------------------------------------------------------------------------------------------


def build_model(recipe: Recipe, *, mixed_precision: str = "no", empty: bool = False) -> nn.Module:
    """The transformer of `recipe.model`, on the CPU, with `requires_grad` on what trains.

    What trains is float32; what is frozen is bfloat16 where `mixed_precision` is "bf16", as in the pipeline. An
    `empty` one has no values yet, though memory of its own: accelerate tells parameters apart by their addresses.
    Raises InputError where the checkpoint does not load or a name of `recipe.trainable` matches nothing.
    """
    model = _build(recipe, mixed_precision=mixed_precision, empty=empty)
    return model.to_empty(device="cpu") if empty else model


def model_on_paper(recipe: Recipe, *, mixed_precision: str = "no") -> nn.Module:
    """The same on the meta device: its shapes and what trains, for no memory and in seconds."""
    return _build(recipe, mixed_precision=mixed_precision, empty=True)


def _build(recipe: Recipe, *, mixed_precision: str, empty: bool) -> nn.Module:
    set_seed(recipe.seed)  # adapters start equal on all ranks, and in every run of the recipe
    lora = recipe.trainable.lora
    dtype = torch.bfloat16 if lora and mixed_precision == "bf16" else torch.float32
    transformer = load_transformer(recipe, dtype, empty=empty)
    # what Trainer's reporters ask of a config, and diffusers' config lacks
    transformer.config.to_json_string = transformer.to_json_string
    transformer.config.to_dict = lambda config=transformer.config: dict(config)
    if lora:
        model = add_lora(transformer, lora, empty=empty)
    else:
        model = transformer.requires_grad_(False)
        for parameter in matching(parameters(model), recipe.trainable.modules, "trainable.modules").values():
            parameter.requires_grad_(True)
    freeze_unused(model, num_layers=transformer.config.num_layers)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"trainable: nothing trains; what {recipe.model!r} has by those names gets no gradient")
    low_lr_parameters(model, recipe.trainable.low_lr_modules)  # a name that matches nothing shows before all else
    for parameter in model.parameters() if mixed_precision == "bf16" and not lora else ():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def load_transformer(recipe: Recipe, dtype: torch.dtype, *, empty: bool) -> QwenImageTransformer2DModel:
    """The transformer as the checkpoint has it; an `empty` one is its shapes on the meta device.

    One that was saved quantised, as its config says, is loaded so by diffusers; to train adapters on it is all it can.
    """
    where = {"subfolder": TRANSFORMER_FOLDER, "revision": recipe.revision}
    try:
        config = QwenImageTransformer2DModel.load_config(recipe.model, **where)
        if (quantised := config.get("quantization_config")) and recipe.trainable.lora is None:
            raise InputError(
                f"trainable: the transformer of {recipe.model!r} is quantised ({quantised.get('quant_method')}), so "
                "its own weights cannot train; set trainable.lora, or name a checkpoint that is not quantised"
            )
        if not empty:  # never a pickle
            return QwenImageTransformer2DModel.from_pretrained(
                recipe.model, dtype=dtype, use_safetensors=True, **where
            )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"model: cannot load the transformer of {recipe.model!r}: {error}") from error
    with init_empty_weights():  # torch's own `to`: diffusers' warns of it, whatever the model
        return nn.Module.to(QwenImageTransformer2DModel.from_config(config), dtype)


def add_lora(transformer: QwenImageTransformer2DModel, lora: Lora, *, empty: bool = False) -> PeftModel:
    """`transformer` with adapters, float32 whatever its own dtype; nothing else trains.

    Always peft's own wrapper: with diffusers' `add_adapter` Trainer would save the whole base at every checkpoint.
    """
    names = lora_targets(transformer, lora.target_modules)
    if not empty:
        logger.info("LoRA: %d linear layers, rank %d, alpha %g", len(names), lora.rank, lora.alpha)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    model = get_peft_model(transformer, config)
    if lora.init_from is not None and not empty:
        load_lora(model, lora.init_from)
        logger.info("LoRA: started from %s", lora.init_from)
    return model


def lora_targets(transformer: nn.Module, wanted: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that a preset, or a list of last parts of names, stands for."""
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    matched = set()
    for part in PRESETS[wanted] if isinstance(wanted, str) else wanted:
        found = {name for name in layers if f".{name}".endswith(f".{part}")}
        if not found:
            raise InputError(
                f"trainable.lora.target_modules: {part!r} is the end of no linear layer's name; "
                f"there are {', '.join(PRESETS['all-linear'])}, and the presets {', '.join(PRESETS)}"
            )
        matched |= found
    return sorted(matched)


def freeze_unused(model: nn.Module, *, num_layers: int) -> None:
    """Freeze the six tensors of the last block that no gradient reaches, and adapters on them.

    The text stream ends there: nothing reads what its last output projection and its last MLP make
    (diffusers/models/transformers/transformer_qwenimage.py:980). Left in, they would stall DDP.
    """
    last = f"transformer_blocks.{num_layers - 1}"
    unused = (f"{last}.attn.to_add_out", f"{last}.txt_mlp")
    for name, parameter in parameters(model).items():
        if any(matches(name, part) for part in unused):
            parameter.requires_grad_(False)


def low_lr_parameters(model: nn.Module, modules: Sequence[str]) -> list[nn.Parameter]:
    """What trains at half the rate. Raises InputError for a name that matches nothing that trains."""
    trainable = {name: parameter for name, parameter in parameters(model).items() if parameter.requires_grad}
    return list(matching(trainable, modules, "trainable.low_lr_modules").values())


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the transformer's own names, whatever wraps it or its blocks."""
    return {
        name.removeprefix("base_model.model.").replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
    }


def matching(named: Mapping[str, nn.Parameter], parts: Iterable[str], field: str) -> dict[str, nn.Parameter]:
    """Those of `named` that some part matches; InputError for a part that matches none of them."""
    found: dict[str, nn.Parameter] = {}
    for part in parts:
        hits = {name: parameter for name, parameter in named.items() if matches(name, part)}
        if not hits:
            some = sorted({name.split(".")[0] for name in named})
            raise InputError(
                f"{field}: {part!r} matches no parameter that could train; it must be whole parts of a dotted name "
                f"below {', '.join(some)}, as 'transformer_blocks.0.attn' or 'img_mlp'"
            )
        found |= hits
    return found


def matches(name: str, part: str) -> bool:
    """True where the components of `part` occur side by side in the dotted `name`; "." matches all."""
    return part == "." or f".{part}." in f".{name}."


def enable_activation_checkpointing(model: nn.Module, options: Mapping[str, Any] | None = None) -> None:
    """What Trainer calls activation checkpointing, by diffusers' name; its models lack Trainer's.

    Raises InputError for options that it does not know: every block is checkpointed, the way torch recommends.
    """
    if options not in (None, {}, {"use_reentrant": False}):
        raise InputError(
            f"training.activation_checkpointing_kwargs: got {options}, wanted no more than use_reentrant: false; "
            "leave it out"
        )
    transformer = model.get_base_model() if isinstance(model, PeftModel) else model
    transformer.enable_gradient_checkpointing()


def compile_blocks(model: nn.Module, *, backend: str, mode: str | None) -> None:
    """Compile the transformer block by block: all are alike, so it takes a sixtieth of the whole."""
    transformer = model.get_base_model() if isinstance(model, PeftModel) else model
    transformer.compile_repeated_blocks(backend=backend, mode=mode)


# --- running ---------------------------------------------------------------------------------------------------------


def predict(model: nn.Module, batch: Batch, noised: Tensor, sigma: Tensor) -> Tensor:
    """The velocity `[B, S, 64]` that the model sees in `noised[B, S, 64]` at `sigma[B]`, 0 (clean) to 1.

    As the pipeline does (diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:800-825): sources follow the
    target, positions come from the grids, no guidance, and of the output only the target's part counts. Inputs are
    float32, so that autocast and the model alone decide where precision is given up.
    """
    mask = None if batch["prompt_mask"].all() else batch["prompt_mask"]  # without one, faster attention can be used
    shapes = [(1, height, width) for height, width in batch["grids"]]
    (output,) = model(
        hidden_states=torch.cat([noised.float(), batch["source_latents"].float()], dim=1),
        encoder_hidden_states=batch["prompt_embeds"].float(),
        encoder_hidden_states_mask=mask,
        timestep=sigma.float(),
        img_shapes=[shapes] * len(noised),
        guidance=None,
        return_dict=False,
    )
    return output[:, : noised.shape[1]]


# --- weights on disk -------------------------------------------------------------------------------------------------


def save_weights(
    model: nn.Module, folder: str | Path, *, writes: bool = True, dtype: torch.dtype | None = None
) -> None:
    """Write what trains as diffusers loads it: `pytorch_lora_weights.safetensors`, or the folder `transformer/`.

    `dtype`: of the transformer, if not its own. Every rank of a sharded model calls it; the others do not write.
    """
    if not isinstance(model, PeftModel):
        tensors = gathered(parameters(model), keep=writes, dtype=dtype)
        if writes:
            with init_empty_weights():
                whole = QwenImageTransformer2DModel.from_config(model.config)
            whole.load_state_dict(tensors, assign=True)
            whole.save_pretrained(Path(folder) / TRANSFORMER_FOLDER)
        return
    tensors = gathered(adapters(model), keep=writes)
    if not writes:
        return
    config = model.peft_config["default"]
    QwenImageLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers={name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        transformer_lora_adapter_metadata={
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "target_modules": sorted(config.target_modules),
        },
    )
    with safe_open(Path(folder) / LORA_FILE, framework="pt") as file:
        assert set(file.keys()) == set(tensors), "the file must hold every adapter, or diffusers loads less in silence"


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Read back, bit for bit, what `save_weights` wrote; raises InputError where it is for another model."""
    if isinstance(model, PeftModel):
        load_lora(model, Path(folder) / LORA_FILE)
        return
    wanted, seen = {key: value.shape for key, value in model.state_dict().items()}, set()
    for path in sorted((Path(folder) / TRANSFORMER_FOLDER).glob("*.safetensors")):
        tensors = load_file(path)
        for key, tensor in tensors.items():
            if tensor.shape != wanted.get(key) or not tensor.is_floating_point():
                raise InputError(f"{path}: {key} of shape {list(tensor.shape)} is not the model's; take another one")
        model.load_state_dict(tensors, strict=False)  # one shard at a time; together they are all of it
        seen |= tensors.keys()
    if missing := sorted(wanted.keys() - seen):
        raise InputError(f"{folder}: has no {missing[0]}, which the model has; take another checkpoint")


def adapters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The adapter's own parameters by the keys that diffusers gives them in a file."""
    found = {name: parameter for name, parameter in parameters(model).items() if ".lora_" in name}
    return {f"transformer.{name.replace('.default.', '.')}": parameter for name, parameter in found.items()}


def load_lora(model: PeftModel, source: str | Path) -> None:
    """Fill the adapters from a LoRA file, a folder with one, or a Hub id, in any layout that `read_lora` knows.

    Raises InputError unless all of it is taken, and its layers, rank and alpha are those of `model`.
    """
    where = f"trainable.lora: {source}"
    tensors, metadata = read_lora(source, where=where)
    wanted = adapters(model)
    config = model.peft_config["default"]
    misfits = sorted(wanted.keys() ^ tensors.keys())
    both = sorted(wanted.keys() & tensors.keys())
    misfits += [key for key in both if wanted[key].shape != tensors[key].shape or not tensors[key].is_floating_point()]
    if misfits:
        raise InputError(
            f"{where} is no LoRA of rank {config.r} on the layers that the recipe names: {len(misfits)} tensors "
            f"differ, the first is {misfits[0]}; set trainable.lora.rank and .target_modules to those of the file"
        )
    settings = {key.removeprefix("transformer."): value for key, value in (metadata or {}).items()}
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
