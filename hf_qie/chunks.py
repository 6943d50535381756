"""The work of RUN 1: rows, a chunk at a time, through encoder and VAE into Arrow files.

A chunk is a fixed range of rows. Threads read and prepare its pictures while one thread runs the models; the file
appears under its name only when it is complete, beside an account of what happened to each of its rows.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hf_qie.embeddings import LATENT_CHANNELS, move_durably, to_table, write_durably
from hf_qie.encoder import Encoder, PromptStates
from hf_qie.latents import LatentEncoder, grid_of
from hf_qie.prepare import Direction, Picture, Plan, Prepared, prepare
from hf_qie.prompts import Prompt
from hf_qie.recipe import InputError
from hf_qie.rows import BadRow

WINDOWS = 2  # batches under way: one is encoded while the next is read
WRITER_BATCH_SIZE = 16  # rows held before they are written: a row has megabytes


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a rank loads once, and only when there is a chunk to do."""

    processor: Any
    encoder: Encoder
    latents: LatentEncoder


@dataclass(kw_only=True)
class Account:
    """What became of the rows of a chunk."""

    rows_in: int = 0
    rows_out: int = 0
    rows_without_caption: int = 0
    num_tokens: int = 0  # that the encoder ran
    num_tokens_apart: int = 0  # of one pass per caption
    bad: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: "Account") -> None:
        """Take in another chunk."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class ChunkWriter:
    """Turns ranges of rows into chunk files. One a task and rank."""

    def __init__(self, plan: Plan, models: Models, *, progress: Callable[[int], Any]):
        self.plan, self.models, self.progress = plan, models, progress
        self.features = plan.features(models.encoder.width)

    def __enter__(self) -> "ChunkWriter":
        """Start the threads."""
        device = self.models.encoder.device
        self.readers = ThreadPoolExecutor(self.plan.extract.num_workers, "reader")
        self.runner = ThreadPoolExecutor(1, "models", initializer=use_device, initargs=(device,))
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what is under way, and end the threads."""
        self.readers.shutdown(cancel_futures=True)
        self.runner.shutdown(cancel_futures=True)

    def write(self, path: Path, rows: range, *, account_path: Path, aside: Path) -> None:
        """Encode `rows` into the Arrow file `path`, written `aside` until it is whole and its account is on disk."""
        account = Account(rows_in=len(rows))
        windows, loop = asyncio.Semaphore(WINDOWS), None

        async def embed(batch: dict[str, list[Any]], rank_of_map: int | None) -> pa.Table:
            # `map` knows no rank, as the launcher owns the processes; it is fixed before
            assert rank_of_map is None
            nonlocal loop
            loop = asyncio.get_running_loop()
            wanted = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            async with windows:
                ready = await asyncio.gather(
                    *(loop.run_in_executor(self.readers, self.prepare, row) for row in wanted)
                )
                table = await loop.run_in_executor(self.runner, self.encode, wanted, ready, account)
            self.progress(len(wanted))
            return table

        chunk = self.plan.rows.table.select(rows)
        chunk.map(
            embed,
            batched=True,
            batch_size=self.plan.extract.batch_size,
            with_rank=True,
            remove_columns=chunk.column_names,
            features=self.features,
            cache_file_name=str(aside),
            load_from_cache_file=False,
            writer_batch_size=WRITER_BATCH_SIZE,
            new_fingerprint=path.stem,  # hashing a function that holds a model is slow and differs every run
        )
        loop.close()  # `map` leaves it, and its file handles, to the garbage collector
        account.bad.sort(key=lambda bad: bad["row"])
        write_durably(account_path, json.dumps(vars(account), ensure_ascii=False))
        move_durably(aside, path)

    def prepare(self, row: dict[str, Any]) -> Prepared | BadRow:
        """Read the pictures of a row and make its prompts. Runs in many threads."""
        try:
            return prepare(row, self.plan, self.models.processor)
        except BadRow as error:
            return error

    def encode(self, rows: list[dict[str, Any]], ready: Sequence[Prepared | BadRow], account: Account) -> pa.Table:
        """Run the models over a batch; bad rows go to the account, the others to a table. Runs in one thread."""
        good = [one for one in ready if not isinstance(one, BadRow)]
        outcome = iter(run_models(good, self.models, self.plan) if good else [])
        kept = []
        for row, one in zip(rows, ready, strict=True):
            result = one if isinstance(one, BadRow) else next(outcome)
            if isinstance(result, BadRow):
                self.note_bad(row, result, account)
                continue
            kept.append(result)
            account.rows_out += 1
            account.rows_without_caption += not one.directions[0].captions
            account.num_tokens += sum(direction.prompt.num_tokens for direction in one.directions)
            account.num_tokens_apart += sum(direction.prompt.num_tokens_apart for direction in one.directions)
        return to_table(kept, self.features)

    def note_bad(self, row: dict[str, Any], bad: BadRow, account: Account) -> None:
        """List a bad row, or stop the run where the recipe says so."""
        if self.plan.extract.on_bad_row == "fail":
            raise InputError(
                f"tasks.{self.plan.task.name}: row {row['row']}: {bad.column}: {f'{bad.path}: ' if bad.path else ''}"
                f"{bad.reason}; "
                "mend it, or set extract.on_bad_row: skip to list such rows and go on"
            ) from bad
        account.bad.append({"row": row["row"], "column": bad.column, "path": bad.path, "reason": bad.reason})


def use_device(device: torch.device) -> None:
    """A thread starts on the first device, whatever the others use."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


def run_models(rows: Sequence[Prepared], models: Models, plan: Plan) -> list[dict[str, Any] | BadRow]:
    """All columns of each row, or why its numbers cannot be stored."""
    prompts = [direction.prompt for row in rows for direction in row.directions]
    states = iter(encode_prompts(prompts, models.encoder, batch_size=plan.extract.batch_size))
    latents = encode_pictures(rows, models, plan)
    results: list[dict[str, Any] | BadRow] = []
    for row, latents_of in zip(rows, latents, strict=True):
        columns = dict(row.columns)
        for direction in row.directions:
            columns |= direction_columns(direction, next(states), latents_of, plan)
        unfit = [name for name, value in columns.items() if isinstance(value, np.ndarray) and not fits_float16(value)]
        results.append(BadRow("values beyond float16 (65504) or not finite", column=unfit[0]) if unfit else columns)
    return results


def encode_prompts(prompts: Sequence[Prompt], encoder: Encoder, *, batch_size: int) -> list[PromptStates]:
    """States of each prompt; those of like length share a pass, so that little of it is padding."""
    order = sorted(range(len(prompts)), key=lambda place: prompts[place].num_tokens)
    states: dict[int, PromptStates] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        states |= zip(places, encoder([prompts[place] for place in places]), strict=True)
    return [states[place] for place in range(len(prompts))]


def direction_columns(
    direction: Direction, states: PromptStates, latents: Mapping[Picture, np.ndarray], plan: Plan
) -> dict[str, Any]:
    """The columns of one direction, float16 arrays for the matrices."""
    names = [f"text_embeds_{caption}" for caption in (*direction.captions, "drop")]
    columns: dict[str, Any] = {"image_embeds": to_float16(states.image)}
    columns |= {name: to_float16(text) for name, text in zip(names, states.texts, strict=True)}
    if not direction.prefix or plan.inverse_latents:
        sources = [latents[picture] for picture in direction.sources]
        columns["target_latents"] = latents[direction.target]
        columns["target_grid"] = grid_of(direction.target[1])
        columns["source_latents"] = np.concatenate(sources) if sources else np.empty((0, LATENT_CHANNELS), np.float16)
        columns["source_grids"] = [grid_of(size) for _, size in direction.sources]
    return {direction.prefix + name: value for name, value in columns.items()}


def encode_pictures(rows: Sequence[Prepared], models: Models, plan: Plan) -> list[dict[Picture, np.ndarray]]:
    """Latents of each row's pictures; those of one size share a pass, `vae_batch_size` at a time."""
    by_size: dict[tuple[int, int], list[tuple[int, Picture]]] = defaultdict(list)
    for number, row in enumerate(rows):
        for picture in row.pixels:
            by_size[picture[1]].append((number, picture))
    latents: list[dict[Picture, np.ndarray]] = [{} for _ in rows]
    step = plan.extract.vae_batch_size
    for wanted in by_size.values():
        for start in range(0, len(wanted), step):
            batch = wanted[start : start + step]
            encoded = models.latents([rows[number].pixels[picture] for number, picture in batch])
            for (number, picture), value in zip(batch, encoded, strict=True):
                latents[number][picture] = to_float16(value)
    return latents


def to_float16(values: torch.Tensor) -> np.ndarray:
    """As stored: exact for bfloat16 from 2^-17 to 65504, at most 2^-25 off below."""
    return values.to(torch.float16).cpu().numpy()


def fits_float16(values: np.ndarray) -> bool:
    """False where rounding to float16 made an infinity, or the model gave none of a number."""
    return bool(np.isfinite(values).all())
