"""The work of RUN 1: rows, a chunk at a time, through encoder and VAE into Arrow files.

A chunk is a fixed range of rows, done in windows of a few batches. While threads read the images of one window, one
thread runs the models over the window before it, and `map` writes the one before that. The file of a chunk appears
under its name only when it is complete; its manifest says what became of each of its rows.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from PIL import Image

from hf_qie.data.images import to_pixels
from hf_qie.data.samples import BadRow
from hf_qie.data.schema import to_table
from hf_qie.extraction.batching import fits_float16, like_length, same_size, shared_passes, to_float16
from hf_qie.extraction.manifest import Counts, complete_chunk
from hf_qie.extraction.plan import Plan, SizedFile
from hf_qie.extraction.preprocess import ImageCache, Prepared, prepare
from hf_qie.extraction.reuse import Reuse

WINDOW_BATCHES = 8  # among that many batches' rows those of like length are put together
WINDOWS = 3  # under way at a time: one is encoded while the next is read, and the one after begun
TABLES = 4  # windows that are under way or wait to be written: the next one begins while a table is written
AHEAD = 2  # batches handed to the models' thread before it has done them
WRITER_BATCH_SIZE = 16  # rows held before they are written: a row has megabytes


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a rank loads once, and only when there is a chunk to do."""

    processor: Any
    encoder: Any  # of `Family.load_encoder`
    latents: Any  # of `Family.load_vae`; None: `extract.latents` is false


class Chunk:
    """A range of rows under way."""

    def __init__(self, table: Dataset, plan: Plan, reuse: Reuse | None):
        self.table = table
        self.images = ImageCache((row for row in table if not (reuse and reuse.has(row["row"]))), plan)
        self.latents: dict[SizedFile, Future[np.ndarray]] = {}  # of images that several rows use
        self.reads: dict[int, Future[Prepared]] = {}  # by row, begun ahead
        self.claimed = Event()  # by the last window so far: it has taken its part of the images
        self.claimed.set()


class ChunkWriter:
    """Turns ranges of rows into chunk files. One a task and rank; rows of `reuse` pass no model."""

    def __init__(self, plan: Plan, models: Models, *, progress: Callable[[int], Any], reuse: Reuse | None = None):
        self.plan, self.models, self.progress, self.reuse = plan, models, progress, reuse
        self.features = plan.features
        self.batch_size = plan.extract.batch_size

    @property
    def window_rows(self) -> int:
        """Rows of a window."""
        return WINDOW_BATCHES * self.batch_size

    def __enter__(self) -> "ChunkWriter":
        """Start the threads."""
        self.readers = ThreadPoolExecutor(self.plan.extract.num_workers, "reader")
        self.windows = ThreadPoolExecutor(WINDOWS, "window")
        self.runner = ThreadPoolExecutor(1, "models", initializer=lambda: use_device(self.models.encoder.device))
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what is under way, and end the threads."""
        for threads in (self.readers, self.windows, self.runner):
            threads.shutdown(cancel_futures=True)

    def open(self, rows: range) -> Chunk:
        """Begin a chunk: its first window is read while the models still work on the last of another chunk."""
        chunk = Chunk(self.plan.rows.table.select(rows), self.plan, self.reuse)
        first = range(min(len(chunk.table), self.window_rows))
        chunk.reads = {row["row"]: self.readers.submit(self._read, row, chunk) for row in chunk.table.select(first)}
        return chunk

    def write(self, path: Path, chunk: Chunk, *, part: Path, near_end: Callable[[], object]) -> None:
        """Encode a chunk into the Arrow file `path`, written to `part` until it is complete and has its manifest.

        `near_end` is called once, when the last window alone is under way: the time to open the next chunk.
        """
        counts, tables, loop = Counts(), asyncio.Semaphore(TABLES), None
        last = int(chunk.table[-1]["row"])

        async def embed(batch: dict[str, list[Any]]) -> pa.Table:
            nonlocal loop
            loop = asyncio.get_running_loop()
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            async with tables:
                before, chunk.claimed = chunk.claimed, Event()
                begun = loop.run_in_executor(self.windows, self._embed, rows, chunk, (before, chunk.claimed))
                if rows[-1]["row"] == last:  # behind it in line: its turn comes when there is room for a window
                    await loop.run_in_executor(self.windows, near_end)
                table, of_window = await begun
            counts.add(of_window)
            self.progress(len(rows))
            return table

        outside_loops(
            chunk.table.map,
            embed,
            batched=True,
            batch_size=self.window_rows,
            remove_columns=chunk.table.column_names,
            features=self.features,
            cache_file_name=str(part),
            load_from_cache_file=False,
            writer_batch_size=WRITER_BATCH_SIZE,
            new_fingerprint=path.stem,  # hashing a function that holds a model is slow and differs every run
        )
        loop.close()  # `map` leaves it, and its file handles, to the garbage collector
        counts.bad.sort(key=lambda bad: bad["row"])
        complete_chunk(part, path, counts)

    def _read(self, row: dict[str, Any], chunk: Chunk) -> Prepared:
        """A row made ready, or taken over from a previous set; raises BadRow. Runs in many threads."""
        if self.reuse and self.reuse.has(row["row"]):
            return Prepared(columns=self.reuse.row(row["row"]), directions=[], resized={}, is_reused=True)
        return self.prepare(row, chunk)

    def prepare(self, row: dict[str, Any], chunk: Chunk) -> Prepared:
        """A row made ready for the models; raises BadRow."""
        return prepare(row, chunk.images, plan=self.plan, processor=self.models.processor)

    def where(self, row: Mapping[str, Any]) -> str:
        """A row in a message."""
        return f"tasks.{self.plan.task.name}: row {row['row']}"

    def _embed(self, rows: list[dict[str, Any]], chunk: Chunk, turn: tuple[Event, Event]) -> tuple[pa.Table, Counts]:
        """The table of a window, and what became of its rows. Runs in one thread a window."""
        (before, claimed), counts = turn, Counts(rows_in=len(rows))
        try:
            begun = [chunk.reads.pop(row["row"], None) or self.readers.submit(self._read, row, chunk) for row in rows]
            good = [read.result() for read in begun if not isinstance(read.exception(), BadRow)]
            good = [row for row in good if row.directions]  # of the others all columns are known
            before.wait()  # windows take images in their order, or batches would depend on which was faster
            latents, mine = self._claim(good, chunk)
        finally:
            claimed.set()
        try:
            self._encode_images(mine, latents)
        except BaseException as error:
            for sized in mine:  # other windows may wait for them
                if not latents[sized].done():
                    latents[sized].set_exception(error)
            raise
        self.encode_prompts(good, counts)
        return self._to_table(rows, begun, latents, counts), counts

    def _claim(
        self, rows: Sequence[Prepared], chunk: Chunk
    ) -> tuple[dict[SizedFile, Future], dict[SizedFile, Image.Image]]:
        """A promise of the latents of every image of a window, and the images that this window has to encode."""
        latents, mine = {}, {}
        for sized, image in (item for row in rows for item in row.resized.items()):
            if sized not in latents:
                known = chunk.latents.get(sized)
                latents[sized] = known or Future()
                if known is None:
                    mine[sized] = image
                if sized[0] in chunk.images.shared:
                    chunk.latents[sized] = latents[sized]
        return latents, mine

    def _encode_images(
        self, images: Mapping[SizedFile, Image.Image], latents: Mapping[SizedFile, Future[np.ndarray]]
    ) -> None:
        """Keep the promise for `images`; those of one size share a pass, `vae_batch_size` at a time."""
        batches = same_size(list(images), batch_size=self.plan.extract.vae_batch_size)
        pixels = ([to_pixels(images[sized]) for sized in batch] for batch in batches)
        for batch, encoded in zip(batches, self._run(self.models.latents, pixels), strict=True):
            for sized, values in zip(batch, encoded, strict=True):
                latents[sized].set_result(to_float16(values))

    def encode_prompts(self, rows: Sequence[Prepared], counts: Counts) -> None:
        """Add the columns of embeddings to each row; `counts` counts the tokens."""
        passes = shared_passes(rows, batch_size=self.batch_size)
        batches = like_length(passes, batch_size=self.batch_size)
        prompts = ([one.prompt for one in batch] for batch in batches)
        for batch, encoded in zip(batches, self._run(self.models.encoder, prompts), strict=True):
            lengths = [one.prompt.num_tokens for one in batch]
            counts.num_tokens += sum(lengths)
            counts.num_tokens_padded += max(lengths) * len(lengths)
            for one, embeds in zip(batch, encoded, strict=True):
                one.keep(embeds, prompt_columns=self.plan.family.prompt_columns)
        counts.num_tokens_apart += sum(one.prompt.num_tokens_apart for row in rows for one in row.directions)

    def _run(self, model: Callable[[list], list], batches: Iterable[list]) -> Iterator[list]:
        """What `model` makes of each batch; the next ones are made ready and wait in line while it works."""
        waiting: deque[Future[list]] = deque()
        for batch in batches:
            waiting.append(self.runner.submit(model, batch))
            if len(waiting) == AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _to_table(
        self,
        rows: Sequence[dict[str, Any]],
        reads: Sequence[Future[Prepared]],
        latents: Mapping[SizedFile, Future[np.ndarray]],
        counts: Counts,
    ) -> pa.Table:
        """The good rows in the order of the input; the bad ones are listed in `counts`."""
        good = []
        for row, read in zip(rows, reads, strict=True):
            try:
                good.append(self._columns(read.result(), latents))
            except BadRow as bad:
                counts.add_bad(row, bad, self.plan, where=self.where(row))
            else:
                counts.add_good(row, self.plan, is_reused=read.result().is_reused)
        return to_table(good, self.features)

    def _columns(self, row: Prepared, latents: Mapping[SizedFile, Future[np.ndarray]]) -> dict[str, Any]:
        """All columns of a row; raises BadRow where its numbers cannot be stored."""
        columns, none = row.columns, np.empty((0, self.plan.family.latent_width), np.float16)
        for one in row.directions:
            for column in self.plan.stored("latents", one.prefix):
                parts = [latents[image].result() for image in one.images[column.of]]  # one after the other
                columns[one.prefix + column.name] = np.concatenate([none, *parts])
        arrays = {name: columns[name] for name in self.features if isinstance(columns.get(name), np.ndarray)}
        for name, value in arrays.items():
            if not fits_float16(value):
                raise BadRow("values beyond float16 (65504) or not finite", column=name)
        return columns


def outside_loops(function: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """Call what needs an event loop of its own; in a notebook one runs in this thread already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        function(*arguments, **options)
    else:
        with ThreadPoolExecutor(1, "map") as thread:
            thread.submit(function, *arguments, **options).result()


def use_device(device: torch.device) -> None:
    """Set the thread's device: a thread starts on the first one, whatever the others use."""
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device)
