"""Qwen's own vocabulary, from the package dashscope, as the tokenizer that the released checkpoints have."""

import base64
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_qie.models.tiny_parts import SPECIAL_TOKENS


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer to `folder`."""
    lines = files("dashscope").joinpath("resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    specials = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Qwen2Tokenizer(
        vocab={written(token): rank for token, rank in ranks.items()} | specials,
        merges=[tuple(map(written, parents(token, ranks))) for token in ranks if len(token) > 1],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
    )
    tokenizer.save_pretrained(folder)


def parents(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge made `token`: what is left of its bytes by all merges of a lower rank."""
    parts, highest = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        merges = [ranks.get(a + b, highest) for a, b in pairwise(parts)]
        i = min(range(len(merges)), key=merges.__getitem__)
        assert merges[i] < highest
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
