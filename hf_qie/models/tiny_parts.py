"""Parts that the tiny checkpoints of all families share."""

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

# of the released Qwen-Image checkpoints
SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
SCHEDULER |= {"base_image_seq_len": 256, "max_image_seq_len": 8192}
# in the order of their ids in Qwen2.5-VL
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
# of messages with text and images, as those of Qwen2.5-VL and Qwen3-VL write them
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# of the text part of the encoders
TEXT = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 6, "num_key_value_heads": 2}
# of the transformers; a learner is as wide as two cores can train in minutes
LEARNER = {"num_attention_heads": 4, "num_layers": 4, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
SHALLOW = {"num_attention_heads": 4, "num_layers": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}


def token_ids(tokenizer: Qwen2Tokenizer) -> tuple[dict[str, int], dict[str, int]]:
    """What an encoder's config has of the vocabulary: its text part, and all of it."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    text = {"vocab_size": math.ceil(len(tokenizer) / 64) * 64}
    text |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    named = ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>")
    named += ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>")
    return text, {key: ids[token] for key, token in named}


@torch.no_grad()
def tiny_transformer(kind: Any, *, learner: bool, **options: Any) -> nn.Module:
    """A transformer of diffusers' class `kind`; a `learner` has the weights that its layers start with.

    Of another one attention is sharp, so that one prompt token or one source shows among all the others.
    """
    if learner:
        return kind(**LEARNER, **options).eval()
    model = kind(**SHALLOW, **options)
    randomise(model)
    for name, parameter in model.named_parameters():
        if ".attn.norm_" in name:  # of queries and keys
            parameter *= 3
    return model.eval()


def tiny_tokenizer(texts: Iterable[str]) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE, learned until every word of `texts` is one token; other text falls back to bytes."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
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


def randomise(model: nn.Module) -> None:
    """Weights that keep the size of what flows through them, so that every input shows in the output."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        else:  # the scale of a norm
            nn.init.normal_(parameter, mean=1.0, std=0.1)
