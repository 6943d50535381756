"""Run extraction, then training, for half an hour, and see that nothing grows: memory, threads, open files.

    python tests/soak.py [--minutes 30]

leaves outputs/soak.json and docs/soak.png; exit status 1 names what grew. Half of the time is extraction over
generated images, half is training on what was extracted, with evaluation, images, checkpoints and a loader's
worker; each is one process that does the same for as long as it lives.
"""

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count, cycle
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
FEW, MANY, CHUNK_ROWS = 64, 128, 32  # rows of a task: to train on, and of one extraction, done again and again
TASKS = ("edit", "combine", "text_to_image")
BEAT_S = 2.0  # between samples
WARM_UP = 0.2  # of each half: until caches are full and the allocator has what it needs
MOST_GROWTH, MOST_GROWTH_MB = 0.05, 24.0  # of memory over the rest of a half, whichever is more: a line through it
SMALL = {"image_sample_size": 64, "source_sample_size": 96, "dtype": "float32", "num_workers": 2, "batch_size": 4}
# of the image, px
WIDTH, PANEL, MARGIN = 760, 150, 60
INK, FAINT, LINES = "#444444", "#dddddd", {"extraction": "#1f5cc4", "training": "#c2410c"}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A process and all that it started, at one moment."""

    part: str
    minute: float  # since the start of the soak
    memory_mb: float  # resident and anonymous: mapped files are the system's to drop
    threads: int
    files: int  # open
    done: int  # rows, or steps


MEASURED = {"memory_mb": "memory, MB", "threads": "threads", "files": "open files"}


# --- the work


def extraction(folder: Path, done: multiprocessing.Value) -> None:
    """The same rows into one folder after the other."""
    from hf_qie import extract
    from hf_qie.extraction.chunk_writer import ChunkWriter

    quiet()
    embed = ChunkWriter._embed

    def counted(self, rows, *rest):
        done.value += len(rows)
        return embed(self, rows, *rest)

    ChunkWriter._embed = counted
    data = [f"tasks.{name}.data={many(folder, name)}" for name in TASKS]
    for turn in count():
        extract.main([str(folder / "recipe.yaml"), *data, f"extract.output_dir={folder / 'turns' / str(turn)}"])
        shutil.rmtree(folder / "turns" / str(turn - 1), ignore_errors=True)


def training(folder: Path, done: multiprocessing.Value) -> None:
    """One run that would take longer."""
    from transformers import TrainerCallback

    from hf_qie.config.recipe import load_recipe
    from hf_qie.training.sets import open_sets
    from hf_qie.training.setup import build_trainer

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            done.value = state.global_step

    quiet()
    recipe = load_recipe(folder / "recipe.yaml", [f"extract.output_dir={folder / 'sets'}"])
    trainer, _ = build_trainer(recipe, open_sets(recipe))
    trainer.add_callback(Count())
    trainer.train()


def many(folder: Path, task: str) -> Path:
    """The rows of a task that are extracted again and again."""
    return folder / "edits" / f"many-{task}.jsonl"


def quiet() -> None:
    """Say nothing but what is wrong."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def prepare(folder: Path) -> None:
    """A tiny checkpoint, generated images and rows, a recipe for both runs, and a set to train on."""
    from synthetic_edits import synthetic_edits

    from hf_qie import extract
    from hf_qie.demo.tiny import tiny_checkpoint

    quiet()
    tiny_checkpoint(folder / "model")
    synthetic_edits(folder / "edits", rows=200)
    tasks = {}
    for name in TASKS:
        rows = [json.loads(line) for line in (folder / "edits" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for number, path in ((FEW, folder / "edits" / f"few-{name}.jsonl"), (MANY, many(folder, name))):
            chosen = [row | {"instruction": f"{row['instruction']} {i}"} for i, row in zip(range(number), cycle(rows))]
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        tasks[name] = {"data": str(folder / "edits" / f"few-{name}.jsonl"), "eval_rows": 8}
    recipe = {
        "model": str(folder / "model"),
        "tasks": tasks,
        "extract": SMALL | {"output_dir": str(folder / "sets"), "chunk_rows": CHUNK_ROWS},
        "trainable": {"lora": {"rank": 8, "target_modules": "attention"}},
        "mix": {"same_shape": 1},
        "sampling": {"every": 1000, "rows": 2, "num_inference_steps": 4},
        "training": {
            "output_dir": str(folder / "run"),
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_steps": 200_000,
            "logging_steps": 50,
            "save_steps": 250,
            "save_total_limit": 2,
            "eval_strategy": "steps",
            "eval_steps": 250,
            "dataloader_num_workers": 1,
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert extract.main([str(folder / "recipe.yaml")]) == 0


# --- what it takes


def family_of(pid: int) -> list[Path]:
    """A process and its descendants, as folders of /proc."""
    found, parents = [Path(f"/proc/{pid}")], {pid}
    processes = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    for path in sorted(processes, key=lambda path: int(path.name)):  # who was started has the higher number
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent in parents:
            parents.add(int(path.name))
            found.append(path)
    return found


def sample(part: str, pid: int, minute: float, done: int) -> Sample | None:
    """What a process and its descendants take now; None where one ends at this moment."""
    memory_kb = threads = files = 0
    try:
        for process in family_of(pid):
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            memory_kb += int(status["RssAnon"].split()[0])
            threads += int(status["Threads"])
            files += len(list((process / "fd").iterdir()))
    except (OSError, KeyError):
        return None
    return Sample(part=part, minute=minute, memory_mb=memory_kb / 1024, threads=threads, files=files, done=done)


def watch(part: str, work: Callable, folder: Path, *, minutes: float, started: float) -> list[Sample]:
    """The samples of `work`, killed when its time is over."""
    context, samples = multiprocessing.get_context("spawn"), []
    done = context.Value("q", 0)
    process = context.Process(target=work, args=(folder, done))
    process.start()
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        time.sleep(BEAT_S)
        assert process.is_alive(), f"{part} ended before its time, with {process.exitcode}"
        if done.value and (taken := sample(part, process.pid, (time.monotonic() - started) / 60, done.value)):
            samples.append(taken)
    for member in reversed(family_of(process.pid)):
        with suppress(ProcessLookupError):  # it ended with the one that started it
            os.kill(int(member.name), signal.SIGKILL)
    process.join()
    return samples


# --- whether it grows


def growth(minutes: Sequence[float], values: Sequence[float]) -> float:
    """How much a line through the values rises from the first minute to the last."""
    slope, _ = np.polyfit(minutes, values, 1)
    return float(slope * (minutes[-1] - minutes[0]))


def what_grew(samples: Sequence[Sample]) -> list[str]:
    """What grew, in words; nothing where all is well.

    Memory by a line through all samples after the warm-up. Threads and files come and go with the work: of them the
    last third must not have one more than the first, on average.
    """
    found = []
    for part in dict.fromkeys(one.part for one in samples):
        mine = [one for one in samples if one.part == part]
        steady = mine[int(WARM_UP * len(mine)) :]
        memory = [one.memory_mb for one in steady]
        grown = growth([one.minute for one in steady], memory)
        if grown > max(MOST_GROWTH_MB, MOST_GROWTH * float(np.median(memory))):
            found.append(f"{part}: memory grew by {grown:.0f} MB, from {memory[0]:.0f} MB")
        third = len(steady) // 3
        for name in ("threads", "files"):
            values = np.array([getattr(one, name) for one in steady])
            first, last = values[:third].mean(), values[-third:].mean()
            if last > first + 1:
                found.append(f"{part}: {MEASURED[name]} grew from {first:.1f} to {last:.1f} on average")
    return found


# --- the image


def soak_chart(samples: Sequence[Sample]) -> Image.Image:
    """Memory, threads and open files over the minutes, from 0 to a little above the most."""
    height = MARGIN + len(MEASURED) * (PANEL + MARGIN)
    chart = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(chart)
    last = max(one.minute for one in samples)
    left, right = MARGIN, WIDTH - MARGIN // 2
    for place, (part, colour) in enumerate(LINES.items()):
        done = max((one.done for one in samples if one.part == part), default=0)
        words = {"extraction": f"{done:,} rows", "training": f"{done:,} steps"}[part]
        pen.text((left + place * 200, 14), f"{part}: {words}", fill=colour)
    for number, (name, words) in enumerate(MEASURED.items()):
        top = MARGIN + number * (PANEL + MARGIN)
        most = 1.1 * max(getattr(one, name) for one in samples)

        def spot(minute: float, value: float, top: float = top, most: float = most) -> tuple[float, float]:
            return left + minute / last * (right - left), top + PANEL - value / most * PANEL

        pen.text((left, top - 18), words, fill=INK)
        for i in range(4):
            value, minute = i / 3 * most, i / 3 * last
            pen.line([spot(0, value), spot(last, value)], fill=FAINT)
            pen.text((left - 6, spot(0, value)[1]), f"{value:,.0f}", fill=INK, anchor="rm")
            pen.text((spot(minute, 0)[0], top + PANEL + 4), f"{minute:.0f}", fill=INK, anchor="ma")
        for part, colour in LINES.items():
            line = [spot(one.minute, getattr(one, name)) for one in samples if one.part == part]
            if len(line) > 1:
                pen.line(line, fill=colour, width=2)
    pen.text(((left + right) / 2, height - 24), "minutes", fill=INK, anchor="ma")
    return chart


def main() -> int:
    """Soak, judge, draw."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory(prefix="hf_qie-soak-") as name:
        folder = Path(name)
        process = multiprocessing.get_context("spawn").Process(target=prepare, args=(folder,))
        process.start()
        process.join()
        assert process.exitcode == 0, "nothing to soak: the preparation failed"
        started = time.monotonic()
        samples = []
        for part, work in (("extraction", extraction), ("training", training)):
            samples += watch(part, work, folder, minutes=minutes / 2, started=started)
    grew = what_grew(samples)
    (ROOT / "outputs").mkdir(exist_ok=True)
    result = {"minutes": minutes, "grew": grew, "samples": [asdict(one) for one in samples]}
    (ROOT / "outputs" / "soak.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    soak_chart(samples).save(ROOT / "docs" / "soak.png", optimize=True)
    for part in LINES:
        mine = [one for one in samples if one.part == part]
        steady = mine[int(WARM_UP * len(mine)) :]
        grown = growth([one.minute for one in steady], [one.memory_mb for one in steady])
        ranges = {n: (min(getattr(s, n) for s in steady), max(getattr(s, n) for s in steady)) for n in MEASURED}
        print(f"{part}: {mine[-1].done:,} done; memory {grown:+.1f} MB over the time; lowest and highest {ranges}")
    print("\n".join(grew) or "nothing grew")
    return 1 if grew else 0


if __name__ == "__main__":
    sys.exit(main())
