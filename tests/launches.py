"""Launches of RUN 1 whose ranks are forked from a process that has imported all there is: none costs seconds.

What a launcher does for its ranks is done here: the environment that says who they are. Each rank notes the rows that
it encodes, so that a test can count what was done twice, and that it looked at image files.
"""

import multiprocessing
import os
import signal
import time
from functools import cache
from pathlib import Path

from ports import free_port

from hf_qie.data import samples as rows
from hf_qie.extract import main
from hf_qie.extraction.chunk_writer import ChunkWriter
from hf_qie.extraction.preprocess import Prepared

PRELOADED = [
    "launches",
    "hf_qie.hub.publish",
    "hf_qie.extraction.run",
]


@cache
def server() -> multiprocessing.context.ForkServerContext:
    """Forks a rank when it is asked to."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Launch:
    """`ranks` processes at work on one recipe; `notes` is a file that gets a line for each row encoded.

    The last rank can come to a stop after some rows: `stops` is (rows, a signal that it sends itself, or None to sleep
    for ever). Beside `notes`, a file .log has what ranks say, and there is one .stopped once that rank has.
    """

    def __init__(
        self,
        recipe: Path,
        *overrides: str,
        notes: Path,
        ranks: int = 1,
        stops: tuple[int, signal.Signals | None] | None = None,
    ):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        where |= {"LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
        who = [where | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)] if ranks > 1 else [{}]
        arguments = [str(recipe), *overrides]
        self.ranks = [
            server().Process(target=run_rank, args=(arguments, one, notes, stops if one is who[-1] else None))
            for one in who
        ]
        for rank in self.ranks:
            rank.start()

    def alive(self) -> bool:
        """Whether all ranks are at work."""
        return all(rank.is_alive() for rank in self.ranks)

    def kill(self) -> bool:
        """SIGKILL all ranks at once, as a machine dies; False if one had ended before."""
        alive = self.alive()
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()
        return alive

    def join(self, timeout_s: float) -> list[int | None]:
        """Exit code of each rank; None where it is not done in time."""
        for rank in self.ranks:
            rank.join(timeout_s)
        return [rank.exitcode for rank in self.ranks]


def run_rank(
    argv: list[str], environment: dict[str, str], notes: Path, stops: tuple[int, signal.Signals | None] | None
) -> None:
    """What one rank does."""
    os.environ.update(environment)
    with notes.with_suffix(".log").open("ab") as log:
        os.dup2(log.fileno(), 2)
    encode_prompts, look_at, done = ChunkWriter.encode_prompts, rows._look_at, []

    def looked_at(file: str) -> object:
        with notes.with_suffix(".looked").open("a") as log:
            log.write(os.environ.get("RANK", "0"))
        return look_at(file)

    def noted(self: ChunkWriter, given: list[Prepared], *rest: object) -> dict:
        with notes.open("a") as file:
            file.write("".join(f"{row.columns['row']}\n" for row in given))
        done.extend(given)
        if stops and len(done) >= stops[0]:
            notes.with_suffix(".stopped").touch()
            stop(stops[1])
        return encode_prompts(self, given, *rest)

    ChunkWriter.encode_prompts, rows._look_at = noted, looked_at
    raise SystemExit(main(argv))


def stop(sent: signal.Signals | None) -> None:
    """Go no further."""
    if sent:
        os.kill(os.getpid(), sent)
    while True:
        time.sleep(60)
