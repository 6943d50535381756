"""The work of RUN 1: rows, a chunk at a time, through encoder and VAE into Arrow files.

A chunk is a fixed range of rows, done in windows of a few batches. While threads read the pictures of one window, one
thread runs the models over the window before it, and `map` writes the one before that. The file of a chunk appears
under its name only when it is complete, beside an account of what happened to each of its rows.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from hf_qie.data.images import to_pixels
from hf_qie.data.samples import BadRow
from hf_qie.data.schema import to_table
from hf_qie.errors import InputError
from hf_qie.extraction.batching import like_length, same_size, shared_passes
from hf_qie.extraction.encoded import fits_float16, latent_columns, state_columns, to_float16
from hf_qie.extraction.manifest import Account, keep_chunk
from hf_qie.extraction.preprocess import Picture, Pictures, Plan, Prepared, prepare
from hf_qie.extraction.reuse import Kept, in_order
from hf_qie.models.qwen_image.text_encoder import Encoder
from hf_qie.models.qwen_image.vae import LatentEncoder
from hf_qie.runtime.alive import at, at_any_length

WINDOW_BATCHES = 8  # among that many batches' rows those of like length are put together
WINDOWS = 3  # under way at a time: one is encoded while the next is read, and the one after begun
TABLES = 4  # windows that are under way or wait to be written: the next one begins while a table is written
AHEAD = 2  # batches handed to the models' thread before it has done them
WRITER_BATCH_SIZE = 16  # rows held before they are written: a row has megabytes


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a rank loads once, and only when there is a chunk to do."""

    processor: Any
    encoder: Encoder
    latents: LatentEncoder | None  # None: `extract.latents` is false


class Chunk:
    """A range of rows under way."""

    def __init__(self, table: Dataset, plan: Plan, kept: Kept | None):
        self.table = table
        self.account = Account()
        self.pictures = Pictures((row for row in table if not (kept and kept.has(row["row"]))), plan)
        self.latents: dict[Picture, Future[np.ndarray]] = {}  # of pictures that several rows use
        self.reads: dict[int, Future[Prepared | BadRow | pa.Table]] = {}  # by row, begun ahead
        self.claimed = Event()  # by the last window so far: it has taken its part of the pictures
        self.claimed.set()


class ChunkWriter:
    """Turns ranges of rows into chunk files. One a task and rank; rows that are `kept` pass no model."""

    def __init__(self, plan: Plan, models: Models, *, progress: Callable[[int], Any], kept: Kept | None = None):
        self.plan, self.models, self.progress, self.kept = plan, models, progress, kept
        self.features = plan.features(models.encoder.width)
        self.batch_size = plan.extract.batch_size

    def __enter__(self) -> "ChunkWriter":
        """Start the threads."""
        device = self.models.encoder.device
        self.readers = ThreadPoolExecutor(self.plan.extract.num_workers, "reader")
        self.windows = ThreadPoolExecutor(WINDOWS, "window")
        self.runner = ThreadPoolExecutor(1, "models", initializer=use_device, initargs=(device,))
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what is under way, and end the threads."""
        for threads in (self.readers, self.windows, self.runner):
            threads.shutdown(cancel_futures=True)

    def open(self, rows: range) -> Chunk:
        """Begin a chunk: its first window is read while the models still work on the last of another chunk."""
        chunk = Chunk(self.plan.rows.table.select(rows), self.plan, self.kept)
        first = range(min(len(chunk.table), WINDOW_BATCHES * self.batch_size))
        chunk.reads = {row["row"]: self.readers.submit(self.read, row, chunk) for row in chunk.table.select(first)}
        return chunk

    def write(self, path: Path, chunk: Chunk, *, aside: Path, near_end: Callable[[], object]) -> None:
        """Encode a chunk into the Arrow file `path`, written `aside` until it is whole and its account is on disk.

        `near_end` is called once, when the last window alone is under way: the time to open the next chunk.
        """
        tables, loop = asyncio.Semaphore(TABLES), None
        last = int(chunk.table[-1]["row"])

        async def embed(batch: dict[str, list[Any]], rank_of_map: int | None) -> pa.Table:
            # `map` knows no rank, as the launcher owns the processes; it is fixed before
            assert rank_of_map is None
            nonlocal loop
            loop = asyncio.get_running_loop()
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            async with tables:
                before, chunk.claimed = chunk.claimed, Event()
                begun = loop.run_in_executor(self.windows, self.embed, rows, chunk, (before, chunk.claimed))
                if rows[-1]["row"] == last:  # behind it in line: its turn comes when there is room for a window
                    await loop.run_in_executor(self.windows, near_end)
                table, account = await begun
            chunk.account.add(account)
            self.progress(len(rows))
            return table

        encode = partial(
            chunk.table.map,
            embed,
            batched=True,
            batch_size=WINDOW_BATCHES * self.batch_size,
            with_rank=True,
            remove_columns=chunk.table.column_names,
            features=self.features,
            cache_file_name=str(aside),
            load_from_cache_file=False,
            writer_batch_size=WRITER_BATCH_SIZE,
            new_fingerprint=path.stem,  # hashing a function that holds a model is slow and differs every run
        )
        outside_loops(encode)
        loop.close()  # `map` leaves it, and its file handles, to the garbage collector
        chunk.account.bad.sort(key=lambda bad: bad["row"])
        with at_any_length("the writing of a chunk", tell=True):
            keep_chunk(aside, path, chunk.account, data=self.plan.rows.digest)

    def read(self, row: dict[str, Any], chunk: Chunk) -> Prepared | BadRow | pa.Table:
        """Read the pictures of a row and make its prompts, or fetch what is kept of it. Runs in many threads."""
        if self.kept and self.kept.has(row["row"]):
            return self.kept.row(row["row"])
        try:
            return prepare(row, chunk.pictures, plan=self.plan, processor=self.models.processor)
        except BadRow as error:
            return error

    def embed(self, rows: list[dict[str, Any]], chunk: Chunk, turn: tuple[Event, Event]) -> tuple[pa.Table, Account]:
        """The table of a window and the account of its rows. Runs in one thread a window."""
        (before, claimed), account = turn, Account(rows_in=len(rows))
        try:
            begun = [chunk.reads.pop(row["row"], None) or self.readers.submit(self.read, row, chunk) for row in rows]
            ready = [read.result() for read in begun]
            good = [one for one in ready if isinstance(one, Prepared)]
            before.wait()  # windows take pictures in their order, or batches would depend on who was faster
            latents, mine = self.claim(good, chunk)
        finally:
            claimed.set()
        try:
            self.encode_pictures(mine, good, latents)
        except BaseException as error:
            for picture in mine:  # other windows may wait for them
                if not latents[picture].done():
                    latents[picture].set_exception(error)
            raise
        states = self.encode_prompts(good, account)
        done = {picture: promise.result() for picture, promise in latents.items()}
        return self.to_table(rows, ready, states, done, account), account

    def claim(self, rows: Sequence[Prepared], chunk: Chunk) -> tuple[dict[Picture, Future], list[Picture]]:
        """A promise of the latents of every picture of a window, and the pictures that this window has to encode."""
        latents, mine = {}, []
        for picture in (picture for row in rows for picture in row.resized):
            if picture not in latents:
                known = chunk.latents.get(picture)
                latents[picture] = known or Future()
                if known is None:
                    mine.append(picture)
                if picture[0] in chunk.pictures.shared:
                    chunk.latents[picture] = latents[picture]
        return latents, mine

    def encode_pictures(
        self, pictures: Sequence[Picture], rows: Sequence[Prepared], latents: Mapping[Picture, Future]
    ) -> None:
        """Keep the promise for `pictures`; those of one size share a pass, `vae_batch_size` at a time."""
        resized = {picture: image for row in rows for picture, image in row.resized.items()}
        batches = same_size(pictures, batch_size=self.plan.extract.vae_batch_size)
        pixels = ([to_pixels(resized[picture]) for picture in batch] for batch in batches)
        for batch, encoded in zip(batches, self.run(self.models.latents, pixels), strict=True):
            for picture, values in zip(batch, encoded, strict=True):
                latents[picture].set_result(to_float16(values))

    def encode_prompts(self, rows: Sequence[Prepared], account: Account) -> dict[int, dict[str, np.ndarray]]:
        """The columns of states of each direction, by its identity; batches are counted in `account`."""
        passes = shared_passes(rows, batch_size=self.batch_size)
        batches = like_length(passes, batch_size=self.batch_size)
        prompts = ([one.prompt for one in batch] for batch in batches)
        columns = {}
        for batch, encoded in zip(batches, self.run(self.models.encoder, prompts), strict=True):
            lengths = [one.prompt.num_tokens for one in batch]
            account.num_tokens += sum(lengths)
            account.num_tokens_padded += max(lengths) * len(lengths)
            for one, states in zip(batch, encoded, strict=True):
                columns |= state_columns(one, states)
        account.num_tokens_apart += sum(
            direction.prompt.num_tokens_apart for one in passes for direction in one.directions
        )
        return columns

    def run(self, model: Callable[[list], list], batches: Iterable[list]) -> Iterator[list]:
        """What `model` makes of each batch; the next ones are made ready and wait in line while it works."""
        waiting: deque[Future[list]] = deque()
        for batch in batches:
            waiting.append(self.runner.submit(model, batch))
            if len(waiting) == AHEAD:
                yield self.done(waiting.popleft())
        while waiting:
            yield self.done(waiting.popleft())

    def done(self, batch: Future[list]) -> list:
        """What a model made of a batch; a sign of life."""
        made = batch.result()
        at(f"a batch of {self.plan.task.name}")
        return made

    def to_table(
        self,
        rows: Sequence[dict[str, Any]],
        ready: Sequence[Prepared | BadRow | pa.Table],
        states: Mapping[int, dict[str, np.ndarray]],
        latents: Mapping[Picture, np.ndarray],
        account: Account,
    ) -> pa.Table:
        """The good rows in the order of the input; the bad ones go to `account`."""
        made, places, captions = [], [], self.plan.task.columns.captions
        for row, one in zip(rows, ready, strict=True):
            result = self.columns(one, states, latents) if isinstance(one, Prepared) else one
            if isinstance(result, BadRow):
                self.note_bad(row, result, account)
                continue
            if isinstance(result, pa.Table):
                account.rows_kept += 1
                places.append(result)
            else:
                places.append(len(made))
                made.append(result)
            account.rows_without_caption += not any(row["texts"][caption] for caption in captions)
        account.rows_out += len(places)
        table = to_table(made, self.features)
        return in_order(table, places) if len(made) < len(places) else table

    def columns(
        self,
        row: Prepared,
        states: Mapping[int, dict[str, np.ndarray]],
        latents: Mapping[Picture, np.ndarray],
    ) -> dict[str, Any] | BadRow:
        """All columns of a row, or why its numbers cannot be stored."""
        columns = dict(row.columns)
        for direction in row.directions:
            columns |= states[id(direction)]
            if self.plan.extract.latents:
                columns |= latent_columns(direction, latents, self.plan.stored("latents", direction.prefix))
        unfit = [name for name, value in columns.items() if isinstance(value, np.ndarray) and not fits_float16(value)]
        return BadRow("values beyond float16 (65504) or not finite", column=unfit[0]) if unfit else columns

    def note_bad(self, row: dict[str, Any], bad: BadRow, account: Account) -> None:
        """List a bad row, or stop the run where the recipe says so."""
        if self.plan.extract.on_bad_row == "fail":
            raise InputError(
                f"tasks.{self.plan.task.name}: row {row['row']}: {bad.named}; mend it, or set extract.on_bad_row: "
                "skip to list such rows and go on"
            ) from bad
        account.bad.append({"row": row["row"], "column": bad.column, "path": bad.path, "reason": bad.reason})


def outside_loops(function: Callable[[], object]) -> None:
    """Call what needs an event loop of its own; in a notebook one runs in this thread already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        function()
    else:
        with ThreadPoolExecutor(1, "map") as thread:
            thread.submit(function).result()


def use_device(device: torch.device) -> None:
    """Set the thread's device: it starts on the first one, whatever the others use.

    A device without an index is the current one of a process that runs alone.
    """
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device)
