"""A tiny checkpoint for the demo and the tests: real classes and layout, random weights, nothing downloaded.

    python hf_qie/demo/tiny.py [--model outputs/tiny] [--kind edit_plus] [--data outputs/shapes] [--rows 64]

--model: the folder for the checkpoint, which loads in the official diffusers pipeline of its kind (edit_plus,
edit_plus_2511, edit, text_to_image, learner). --data: the folder for two tasks of synthetic edits, --rows of each.
The VAE is trained, all else is random. The kind `learner` can be trained to edit in minutes on a CPU.
"""

import json
import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.modular_pipelines.qwenimage import prompt_templates
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils.logging import disable_progress_bar

from hf_qie.demo.shapes import PALETTE, SHAPES, TASKS, synthetic_edits
from hf_qie.runtime.cli import Options, run_script, to_path, wanted
from hf_qie.runtime.rules import Count

logger = logging.getLogger("hf_qie.demo.tiny")

KINDS = {
    "edit_plus": QwenImageEditPlusPipeline,  # like Qwen-Image-Edit-2509
    "edit_plus_2511": QwenImageEditPlusPipeline,  # the same with zero_cond_t
    "edit": QwenImageEditPipeline,
    "text_to_image": QwenImagePipeline,
    "learner": QwenImageEditPlusPipeline,  # learns in minutes: few image tokens, plain weights in its transformer
}
# of the released Qwen-Image checkpoints
SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
SCHEDULER |= {"base_image_seq_len": 256, "max_image_seq_len": 8192}
# of each causal 3-D convolution the slice that a single image meets, as float16; latents_mean and latents_std
VAE_FILE = Path(__file__).with_name("tiny_vae.safetensors")
VAE_CONFIG = {"base_dim": 16, "dim_mult": [1, 2, 4, 8], "num_res_blocks": 1}
VAE_LOGVAR = 2 * math.log(0.05)  # of the posterior: the noise on latents that its training had
# in the order of their ids in Qwen2.5-VL
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]


def _texts() -> Iterator[str]:
    """What the vocabulary is learned from: the templates and the words of the synthetic edits."""
    yield prompt_templates.QWENIMAGE_PROMPT_TEMPLATE
    yield prompt_templates.QWENIMAGE_EDIT_PLUS_PROMPT_TEMPLATE
    yield prompt_templates.QWENIMAGE_EDIT_PLUS_IMG_TEMPLATE
    for make in TASKS.values():
        yield from (make(random.Random(i), i, 64).captions["instruction"] for i in range(100))
    # words, not sentences: Chinese has no spaces, so that a whole sentence would become one token
    yield from (chinese for table in (PALETTE, SHAPES) for chinese, _ in table.values())


def _tokenizer() -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE, learned until every word of `_texts` is one token; other text falls back to bytes."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(_texts(), trainer)
    learned = json.loads(learner.to_str())["model"]
    specials = {token: len(learned["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(
        vocab=learned["vocab"] | specials,
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=131072,
        padding_side="right",
    )


def _processor(tokenizer: Qwen2Tokenizer, *, max_image_tokens: int) -> Qwen2VLProcessor:
    pixels = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * max_image_tokens}
    return Qwen2VLProcessor(Qwen2VLImageProcessor(**pixels), tokenizer, Qwen2VLVideoProcessor(**pixels))


def _randomise(model: nn.Module) -> None:
    """Weights that keep the size of what flows through them, so that every input shows in the output."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        else:  # the scale of a norm
            nn.init.normal_(parameter, mean=1.0, std=0.1)


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with its own spatial settings; positions count for much, as large biases on query and key see to."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    text = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 96,
        "tokens_per_second": 2,
        "fullatt_block_indexes": [
            1
        ],  # windows of 112 px first, then all: the 7B model has seven of the first to each of these
    }
    named = ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>")
    named += ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>")
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **{key: ids[token] for key, token in named})
    model = Qwen2_5_VLForConditionalGeneration(config)
    _randomise(model)
    for name, parameter in model.model.language_model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            nn.init.normal_(parameter, std=1.0)
    return model.eval()


@torch.no_grad()
def _transformer(kind: str) -> QwenImageTransformer2DModel:
    """Qwen-Image's transformer; sharp attention, so that one prompt token or one source shows among all the others."""
    shape = {"num_attention_heads": 4, "joint_attention_dim": 96}
    if kind == "learner":  # with the weights that its layers start with, as wide as two cores can train in minutes
        shape |= {"num_layers": 4, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
        return QwenImageTransformer2DModel(**shape).eval()
    shape |= {"num_layers": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    model = QwenImageTransformer2DModel(**shape, zero_cond_t=kind == "edit_plus_2511")
    _randomise(model)
    for name, parameter in model.named_parameters():
        if ".attn.norm_" in name:  # of queries and keys
            parameter *= 3
    return model.eval()


@torch.no_grad()
def tiny_vae() -> AutoencoderKLQwenImage:
    """The VAE of tests/train_tiny_vae.py; its normalised latents have mean 0 and std 1 over synthetic images."""
    tensors = load_file(VAE_FILE)
    scale = {name: tensors.pop(name).tolist() for name in ("latents_mean", "latents_std")}
    vae = AutoencoderKLQwenImage(**VAE_CONFIG, **scale).eval()
    for name, parameter in vae.state_dict().items():
        parameter.zero_()
        (parameter[:, :, -1:] if parameter.ndim == 5 else parameter).copy_(tensors[name])
    channels = vae.config.z_dim
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = VAE_LOGVAR
    return vae


def tiny_checkpoint(folder: Path, *, kind: str = "edit_plus", seed: int = 0) -> Path:
    """Write a checkpoint of one of `KINDS` in diffusers layout, all random but vocabulary and VAE; return `folder`.

    Prompt embeddings are 96 wide, latents have 16 channels at 1/8 of the side. The same seed gives the same bytes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        parts = {
            "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            "vae": tiny_vae(),
            "text_encoder": _text_encoder(tokenizer),
            "tokenizer": tokenizer,
            "transformer": _transformer(kind),
        }
    if kind != "text_to_image":
        parts["processor"] = _processor(tokenizer, max_image_tokens=16 if kind == "learner" else 128 * 128)
    KINDS[kind](**parts).save_pretrained(folder)
    return folder


def main(argv: list[str]) -> None:
    """Build what the command line asks for and log where it lies."""
    parser = Options()
    parser.add_argument("--model", type=to_path)
    parser.add_argument("--kind", choices=KINDS, default="edit_plus")
    parser.add_argument("--data", type=to_path)
    parser.add_argument("--rows", type=wanted(Count), default=64)
    args = parser.parse_args(argv)
    disable_progress_bar()  # a bar for one file of a megabyte
    if args.model:
        logger.info("%s checkpoint: %s", args.kind, tiny_checkpoint(args.model, kind=args.kind))
    if args.data:
        for task, path in synthetic_edits(args.data, rows=args.rows).items():
            logger.info("%d rows of %s: %s", args.rows, task, path)


if __name__ == "__main__":
    run_script(main)
