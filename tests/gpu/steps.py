"""The steps of `make gpu`, the most important first, each with the seconds that it may take."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EDIT, EDIT_21 = "QwenImageEditPlusPipeline", "QwenImage21Pipeline"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a process of its own does: a function of a module here, by name, that yields results."""

    name: str
    limit_s: float
    what: str
    function: str = "gpu.training:measure"
    case: Mapping[str, Any] | None = None  # of `gpu.cases.Case`
    settings: Mapping[str, Any] = field(default_factory=dict)
    least_gpus: int = 1


PLAIN, PROFILING, TINY = "train-512", "gpu.profiling:measure", "gpu.tiny_flow:measure"
ENCODING = "gpu.encoding:measure"


def _memory(name: str, **section: Any) -> Step:
    """Training with a section `memory`, at the size of the plain step."""
    return Step(
        name=f"train-{name}", limit_s=60, what=f"the 20B transformer, {section}", case={"memory": section},
        settings={"plain": PLAIN},
    )  # fmt: skip


STEPS = (
    Step(name="tiny", limit_s=100, what="the tiny flow on the GPU against the CPU", function=TINY),
    Step(name=PLAIN, limit_s=60, what="the 20B transformer, target 512", case={}, settings={"bare": True}),
    Step(
        name="train-1024",
        limit_s=70,
        what="the 20B transformer, target 1024",
        case={"target_px": 1024},
        settings={"bare": True},
    ),
    Step(name="encode", limit_s=80, what="the 7B encoder and the VAE", function=ENCODING),
    Step(name="profile", limit_s=60, what="five steps at 512", function=PROFILING, case={}),
    Step(
        name="train21-512-x1",
        limit_s=45,
        what="Qwen-Image-2.1, one noise a row",
        case={"pipeline": EDIT_21},
        settings={"bare": True},
    ),
    Step(
        name="train21-512-x4",
        limit_s=45,
        what="Qwen-Image-2.1, four noises a row",
        case={"pipeline": EDIT_21, "draws_per_row": 4},
        settings={"bare": True},
    ),
    Step(
        name="sharded",
        limit_s=90,
        what="FSDP2 on NCCL: full steps, save, resume; a killed rank",
        function="gpu.sharding:measure",
        least_gpus=2,
    ),
    _memory("nf4", quantization="nf4"),
    _memory("stream", stream_blocks=30),
    _memory("offload", offload_activations=True),
    _memory("int8", quantization="int8"),
    _memory("fp8", quantization="fp8"),
    Step(
        name="train21-1024-x1",
        limit_s=60,
        what="Qwen-Image-2.1 at 1024, one noise a row",
        case={"pipeline": EDIT_21, "target_px": 1024},
        settings={"bare": True},
    ),
    Step(
        name="train21-1024-x4",
        limit_s=60,
        what="Qwen-Image-2.1 at 1024, four noises a row",
        case={"pipeline": EDIT_21, "target_px": 1024, "draws_per_row": 4},
    ),
    Step(
        name="train-compile",
        limit_s=120,
        what="the 20B transformer, compiled blocks",
        case={"training": {"torch_compile": True}},
        settings={"plain": PLAIN},
    ),
    Step(
        name="encode-cudnn",
        limit_s=60,
        what="extraction with one source, where torch may take cuDNN's attention",
        function=ENCODING,
        settings={"cudnn": True},
    ),
)
