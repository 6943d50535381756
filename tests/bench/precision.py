"""Arithmetic of 16 bits in several ways: what moves through memory outside of matrix products, and the error.

    python tests/bench/precision.py

prints the tables of docs/performance.md. Traffic is counted on fake tensors with the released shapes: every kernel
but matrix products and attention, and the bytes that it reads and writes. Errors are those of a transformer of random
values, 512 wide and 8 blocks deep, against float32.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from released import TRANSFORMERS, write_released  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from hf_qie.config.recipe import load_recipe  # noqa: E402
from hf_qie.training.model import base_of, build_model  # noqa: E402
from hf_qie.training.objective import Objective  # noqa: E402
from hf_qie.training.precision import FusedRMSNorm, compute_in  # noqa: E402
from hf_qie.training.stand_ins import FusedNorm  # noqa: E402

EDIT, EDIT_21 = "QwenImageEditPlusPipeline", "QwenImage21Pipeline"
NUM_BLOCKS = {EDIT: 60, EDIT_21: 32}
NUM_TOKENS = {EDIT: 282, EDIT_21: 100}  # of a prompt: with those of one source, and of text alone
AUTOCAST, LESS, SHARDS, OURS = "autocast", "without casts of norms and adapters", "FSDP2's policy", "now"
LIMITED = {"num_attention_heads": 8, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24], "num_layers": 8}
WIDTHS = {EDIT: {"joint_attention_dim": 512}, EDIT_21: {"context_in_dim": 512}}
# matrix products, attention, and what computes nothing
UNCOUNTED = {"mm", "addmm", "bmm", "detach", "alias", "_unsafe_view", "device", "lift_fresh"}
UNCOUNTED |= {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided"}
UNCOUNTED |= {f"_scaled_dot_product_flash_attention_for_cpu{way}" for way in ("", "_backward")}


class Traffic(TorchDispatchMode):
    """Counts kernels, and the bytes of memory that they read and write."""

    def __init__(self):
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        if func._schema.name.removeprefix("aten::").removeprefix("prim::") not in UNCOUNTED and not func.is_view:
            self.kernels += 1
            read = {name: value for name, value in (kwargs or {}).items() if name != "out"}
            self.bytes += sum(size_of(one) for one in tree_leaves((args, read, made)) if isinstance(one, Tensor))
        return made


def size_of(tensor: Tensor) -> int:
    """Bytes in memory: what is expanded lies there once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count * tensor.element_size()


def model_of(pipeline: str, *, lora: bool, **config: Any) -> tuple[nn.Module, Objective]:
    """A transformer of these `config` values, on the meta device, as it trains in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        model, recipe = write_released(Path(folder) / "model", pipeline), Path(folder) / "recipe.yaml"
        (model / "transformer" / "config.json").write_text(json.dumps(TRANSFORMERS[pipeline] | config))
        trainable = {"lora": {"rank": 32, "target_modules": "attention"} if lora else None}
        recipe.write_text(json.dumps({"model": str(model), "tasks": {"a": {"data": "a"}}, "trainable": trainable}))
        loaded = load_recipe(recipe)
        half = "no" if config.keys() >= LIMITED.keys() else "bf16"
        return build_model(loaded, mixed_precision=half, empty=True), Objective(loaded, global_batch_size=1)


def batch_of(objective: Objective, model: nn.Module, side: int, num_tokens: int, make: Callable) -> dict[str, Any]:
    """One row: a target of `side` x `side` tokens, and a source four times as large."""
    latent_width, width = objective.family.widths(base_of(model).config)
    return {
        "target_latents": make(1, side**2, latent_width),
        "source_latents": make(1, 4 * side**2, latent_width),
        "prompt_embeds": make(1, num_tokens, width),
        "prompt_lengths": [num_tokens],
        "image_slots": [[num_tokens // 2]],
        "grids": [(side, side), (2 * side, 2 * side)],
        "noise": make(1, side**2, latent_width).float(),
        "sigma": torch.full((1,), 0.625),  # the model is told it in bfloat16
    }


def prepare(model: nn.Module, way: str) -> None:
    """Make the model compute in bfloat16 in one of the ways, forward and loss to be called in `context`."""
    if way == SHARDS:
        for parameter in model.parameters():  # as they are gathered
            parameter.data = parameter.data.to(torch.bfloat16)
    if way in (SHARDS, OURS):
        plain = [module for module in model.modules() if type(module).__name__ == "RMSNorm"]
        compute_in(model, "bf16")
        for module in plain if way == SHARDS else ():
            module.__class__ = type(module).__mro__[1]  # diffusers' own
        return
    for module in model.modules():
        if way == AUTOCAST and isinstance(module, nn.LayerNorm):  # as on CUDA, and not on the CPU
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        if way == LESS and hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def context(way: str) -> torch.autocast:
    """What is around forward."""
    return torch.autocast("cpu", torch.bfloat16, enabled=way in (AUTOCAST, LESS))


def counted(pipeline: str, way: str, *, lora: bool, num_layers: int) -> Traffic:
    """Of forward and backward of a micro-batch, with activation checkpointing: 512 pixels, one source of 1024."""
    model, objective = model_of(pipeline, lora=lora, num_layers=num_layers)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        base_of(model).enable_gradient_checkpointing()
        prepare(model.train(), way)
        for module in model.modules():
            if isinstance(module, FusedRMSNorm):
                module.__class__ = FusedNorm
        batch = batch_of(objective, model, 32, NUM_TOKENS[pipeline], lambda *of: torch.empty(of, dtype=torch.float16))
        with Traffic() as traffic:
            with context(way):
                loss = objective.losses(model, batch).mean()
            loss.backward()
    return traffic


def traffic_of(pipeline: str, way: str, *, lora: bool) -> tuple[int, float]:
    """Kernels of an inner block, and GB of the released model in a micro-batch."""
    fewer, more = (counted(pipeline, way, lora=lora, num_layers=number) for number in (3, 4))
    of_block = more.bytes - fewer.bytes
    return more.kernels - fewer.kernels, (fewer.bytes + (NUM_BLOCKS[pipeline] - 3) * of_block) / 1e9


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in place of those that are not there; of the base such as bfloat16 has."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    model.to_empty(device="cpu")
    for module, kept in buffers:
        module._buffers |= {name: torch.exp(torch.linspace(0, -9, len(one))) for name, one in kept.items()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(float("norm" in name and "text_norm" not in name), 0.05, generator=generator)
            else:
                parameter.normal_(0, 0.02 if ".lora_" in name else parameter.shape[1] ** -0.5, generator=generator)
            if ".lora_" not in name:
                parameter.copy_(parameter.to(torch.bfloat16))
    return model.train()


def outcome(model: nn.Module, objective: Objective, batch: Mapping[str, Any], way: str | None) -> list[Tensor]:
    """Prediction and gradient of what trains; in float32 without a `way`."""
    model, found = copy.deepcopy(model), []
    if way:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        prepare(model, way)
    predict = objective.family.predict

    def losses() -> Tensor:
        noised = (1 - batch["sigma"]) * batch["target_latents"] + batch["sigma"] * batch["noise"]
        found.append(predict(model, batch, noised, batch["sigma"]).float())
        return (found[0] - batch["noise"] + batch["target_latents"]).square().mean()

    with context(way or ""):
        loss = losses()
    loss.backward()
    gradient = torch.cat([one.grad.flatten().float() for one in model.parameters() if one.grad is not None])
    return [loss.detach(), found[0].detach(), gradient]


def errors_of(pipeline: str, *ways: str, lora: bool) -> list[list[float]]:
    """By way, of loss, prediction and gradient, relative to float32."""
    model, objective = model_of(pipeline, lora=lora, **LIMITED, **WIDTHS[pipeline])
    fill(model)
    generator = torch.Generator().manual_seed(1)
    batch = batch_of(objective, model, 8, 48, lambda *of: torch.randn(of, generator=generator).bfloat16().float())
    exact = outcome(model, objective, batch, None)
    return [
        [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]
        for found in (outcome(model, objective, batch, way) for way in ways)
    ]


def line(pipeline: str, way: str, *, lora: bool) -> str:
    """A line of the table."""
    kernels, gigabytes = traffic_of(pipeline, way, lora=lora)
    return f"| {NAMES[pipeline]} | {'LoRA' if lora else 'all'} | {way} | {kernels} | {gigabytes:,.0f} |"


NAMES = {EDIT: "Qwen-Image-Edit", EDIT_21: "Qwen-Image-2.1"}
KINDS = [(pipeline, lora) for pipeline in NUM_BLOCKS for lora in (True, False)]
WAYS = (AUTOCAST, LESS, SHARDS, OURS)


def main() -> None:
    """Both tables."""
    for pipeline, lora in KINDS:
        for way in WAYS:
            print(line(pipeline, way, lora=lora), flush=True)
    for pipeline, lora in KINDS:
        for way, errors in zip(WAYS, errors_of(pipeline, *WAYS, lora=lora), strict=True):
            cells = " | ".join(f"{error:.1e}" for error in errors)
            print(f"| {NAMES[pipeline]} | {'LoRA' if lora else 'all'} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
