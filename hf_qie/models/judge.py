"""A vision-language model as the judge of edits: one forward pass a question, no text is generated, none is parsed.

A score is the expectation over the answers that the model may give at the first place of its turn, as in G-Eval (Liu
et al. 2023, arXiv 2303.16634). Answers are the digits: Qwen's tokenizer has a token a digit, so that 10 would be two,
and their places would not tell 1 from the start of 10. 0 to 9 times 10/9 is the scale of 0 to 10 of VIEScore.

Letters: V tokens of the vocabulary, A answers.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jinja2 import Environment, StrictUndefined, TemplateError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoProcessor

from hf_qie.config.evaluation import Judge
from hf_qie.errors import InputError
from hf_qie.models.base import read_family
from hf_qie.models.checkpoint import PLAIN, checkpoint_folder
from hf_qie.runtime.device import computes_bfloat16
from hf_qie.runtime.hub_errors import hub_errors

AT = "evaluation.judge"
ANSWERS = "0123456789"
AREA_PX = 1024 * 1024  # larger images are shrunk to it, smaller ones stay: the area that the pipelines work in
FOLLOWED, PRESERVED, QUALITY = "judge_followed", "judge_preserved", "judge_quality"
QUESTIONS = FOLLOWED, PRESERVED, QUALITY  # each in a file beside this one
ADAPTER_FILES = "adapter_config.json", "adapter_model.safetensors"
UNREADABLE = (OSError, SafetensorError, ImportError, RuntimeError, ValueError, TypeError, LookupError)
Answer = tuple[float, float]  # a score, 0 to 10, and the probability that is on the answers


class EditJudge:
    """Scores of an edit by three questions; weights are read when the first is asked.

    Passes have no padding and no other row in them, so that the scores of a row are its own.
    """

    def __init__(self, settings: Judge, *, checkpoint: str, revision: str | None, device: torch.device):
        """`checkpoint`: the model that was trained, whose prompt encoder judges if `settings` names no model.

        Raises InputError for all that can be known before weights are read.
        """
        self.device, self.dtype = device, torch.bfloat16 if computes_bfloat16(device) else torch.float32
        self.name = settings.model or checkpoint
        if settings.model is None:
            whole, self.processor = _own(checkpoint, revision)
            self.folder = whole / "text_encoder"
            self.folders = [self.folder, whole / "processor"]
        else:
            self.folder = _downloaded(settings.model, settings.revision, key="model")
            self.folders = [self.folder]
        _check_config(self.folder, self.name)
        if settings.model is not None:
            self.processor = _processor(self.folder, self.name)
        self.adapter = _adapter(settings.adapter) if settings.adapter else None
        self.template = _chat_template(self.processor, self.name)
        try:
            self.inputs("?", [Image.new("RGB", (64, 64))])
        except (*UNREADABLE, TemplateError) as error:
            message = f"{AT}.model: the chat template of {self.name} does not take an image and text"
            raise InputError(f"{message}: {_first_line(error)}") from error
        self.answers = self._answers()

    @property
    def files(self) -> list[Path]:
        """All that scores depend on, beside the questions."""
        folders = [*self.folders, *([self.adapter] if self.adapter else ())]
        return [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in PLAIN]

    @cached_property
    def model(self) -> Any:
        """With its language head and the adapter, on the device; raises InputError where they do not fit."""
        try:
            model, keys = AutoModelForImageTextToText.from_pretrained(
                self.folder, dtype=self.dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except UNREADABLE as error:
            raise InputError(f"{AT}.model: cannot load {self.name}: {_first_line(error)}") from error
        if missing := sorted(keys["missing_keys"]):
            what = "its language head" if any("head" in name for name in missing) else "all weights"
            raise InputError(f"{AT}.model: {self.name} has no {missing[0]}; a judge needs {what}")
        if self.adapter:
            _put_adapter(model, self.adapter)
        return model.to(self.device).eval().requires_grad_(False)

    def __call__(self, instruction: str, sources: Sequence[Image.Image], output: Image.Image) -> dict[str, float]:
        """Scores by name, of RGB images; without sources there is no judge_preserved.

        judge = sqrt(min(judge_followed, judge_preserved) * judge_quality), as VIEScore has it (Ku et al. 2023, arXiv
        2312.14867) and GEdit-Bench (Liu et al. 2025, arXiv 2504.17761). Its quality, too, is judged without sources.
        judge_mass is the mean over the questions of the probability that is on the answers: where it is small, the
        model would rather say something else, and its scores mean little.
        """
        asked = {FOLLOWED: [*sources, output], PRESERVED: [*sources, output], QUALITY: [output]}
        if not sources:
            del asked[PRESERVED]
        found = {name: self.answer(question(name, instruction, len(sources)), shown) for name, shown in asked.items()}
        scores = {name: score for name, (score, _) in found.items()}
        consistency = min(score for name, score in scores.items() if name != QUALITY)
        mass = sum(mass for _, mass in found.values()) / len(found)
        return {"judge": math.sqrt(consistency * scores[QUALITY]), **scores, "judge_mass": mass}

    @torch.inference_mode()
    def answer(self, text: str, images: Sequence[Image.Image]) -> Answer:
        """The answer to a question about `images`, which stand before it in this order."""
        inputs = self.inputs(text, images).to(self.device)
        inputs = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
        return expectation(logits.cpu(), self.answers)

    def inputs(self, text: str, images: Sequence[Image.Image]) -> Any:
        """What the model is given, up to where it would answer; what `text` has of special tokens is plain text."""
        return self.processor.apply_chat_template(
            conversation(text, [within(image, AREA_PX) for image in images]),
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,
        )

    def _answers(self) -> Tensor:
        """The token of each answer where the model would answer, `[A]`."""
        prompt = self.processor.apply_chat_template(
            conversation("?", []), chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        texts = [prompt, *(prompt + answer for answer in ANSWERS)]
        before, *after = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for answer, tokens in zip(ANSWERS, after, strict=True):
            if tokens[:-1] != before:
                found = self.processor.tokenizer.convert_ids_to_tokens(tokens[len(before) - 1 :])
                raise InputError(
                    f"{AT}.model: the tokenizer of {self.name} has no token for {answer!r} behind its chat template, "
                    f"but {found}; scores are read at one place, so take another model"
                )
        return torch.tensor([tokens[-1] for tokens in after])


def expectation(logits: Tensor, answers: Tensor) -> Answer:
    """The score that `logits[V]` of a place give, and the probability on `answers[A]`.

    10/9 of the sum of digit times probability, by a softmax over the answers alone.
    """
    logits = logits.double()
    share = logits[answers].softmax(dim=0)
    score = (share * torch.arange(len(answers))).sum() * 10 / (len(answers) - 1)
    return float(score), float(logits.softmax(dim=0)[answers].sum())


def question(name: str, instruction: str, num_sources: int) -> str:
    """The text of one of `QUESTIONS`."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True)
    text = (files(__package__) / f"{name}.md").read_text(encoding="utf-8")
    return environment.from_string(text).render(instruction=instruction, num_sources=num_sources)


def questions_digest() -> str:
    """Of the questions, and of how they are asked and answered."""
    asked = [(files(__package__) / f"{name}.md").read_text(encoding="utf-8") for name in QUESTIONS]
    return hashlib.sha256(repr((ANSWERS, AREA_PX, asked)).encode()).hexdigest()


def conversation(text: str, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """One turn of a user: images, and then the text."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def within(image: Image.Image, area_px: int) -> Image.Image:
    """The image, shrunk to `area_px` if it is larger."""
    factor = math.sqrt(area_px / (image.width * image.height))
    if factor >= 1:
        return image
    return image.resize([max(1, int(side * factor)) for side in image.size], Image.Resampling.LANCZOS)


def _own(checkpoint: str, revision: str | None) -> tuple[Path, Any]:
    """A folder with prompt encoder and processor of a checkpoint, and the latter as its family loads it."""
    family = read_family(checkpoint, revision=revision)
    if family.max_sources == 0:
        raise InputError(
            f"{AT}.model: {checkpoint} makes images of text alone and has no processor for images; name a "
            "vision-language model"
        )
    folder = checkpoint_folder(checkpoint, ["text_encoder", "processor"], revision=revision)
    return folder, family.load_processor(checkpoint, revision=revision)


def _processor(folder: Path, name: str) -> Any:
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except UNREADABLE as error:
        raise InputError(f"{AT}.model: {name} has no processor: {_first_line(error)}") from error


def _downloaded(source: str, revision: str | None, *, key: str) -> Path:
    """A folder, or the files at the root of a repository on the Hub (cached), but for code and pickles."""
    if Path(source).is_dir():
        return Path(source)
    patterns = [f"*{kind}" for kind in PLAIN]
    with hub_errors(f"{AT}.{key}: {source!r} is not a folder here"):
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))


def _adapter(source: str) -> Path:
    """The folder of an adapter; a file of it that peft has not written as safetensors is an error."""
    folder = _downloaded(source, None, key="adapter")
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise InputError(f"{AT}.adapter: {source} has no {name}; expected an adapter as peft saves it")
    return folder


def _put_adapter(model: Any, folder: Path) -> None:
    """Load an adapter of peft into the model, whatever release wrote its names; raises InputError if it misfits."""
    try:
        found = model.load_adapter(str(folder), ignore_mismatched_sizes=True)
    except UNREADABLE as error:
        raise InputError(f"{AT}.adapter: cannot load {folder}: {_first_line(error)}") from error
    mismatched = [name for name, *_ in found.mismatched_keys]
    if bad := sorted([*found.missing_keys, *found.unexpected_keys, *mismatched]):
        raise InputError(f"{AT}.adapter: {folder} is not of this model: {bad[0]} is in one of them alone, or differs")


def _check_config(folder: Path, name: str) -> None:
    """Raise InputError unless the model is one that transformers gives images and text, and that answers in text."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UNREADABLE as error:
        raise InputError(f"{AT}.model: {name} is not a model of transformers: {_first_line(error)}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(f"{AT}.model: {name} is a {config.model_type}, not a vision-language model that answers")


def _chat_template(processor: Any, name: str) -> str:
    """Of the processor, or of its tokenizer where it has none; raises InputError where neither has one."""
    if getattr(processor, "image_processor", None) is None:
        raise InputError(f"{AT}.model: {name} has a {type(processor).__name__}, which takes no images")
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError(f"{AT}.model: {name} has no chat template; take a model that was trained on instructions")
    return template


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
