"""What the scripts share: the command line, and the message and exit status of an error.

An option is `--snake_case`, under the name that the recipe, diffusers or the Hub has for it.
"""

import argparse
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hf_qie.errors import InputError
from hf_qie.runtime.files import disk_trouble
from hf_qie.runtime.rules import unknown, validate
from hf_qie.runtime.yaml_io import read_yaml

RANK_0_FIRST_S = 8  # how long another rank waits with its error for rank 0 to print the same
# Warnings as soon as torchao or bitsandbytes is imported, of kernels and classes that nothing here uses
UNHEEDED = ("bitsandbytes.backends.cpu.ops", "diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree")
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # accelerate launch, or torchrun, set one of them


class Options(argparse.ArgumentParser):
    """The command line of a script, described in its docstring; a mistake is an InputError of one line."""

    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise InputError with the documented name of an option, or the nearest known name of an unknown one."""
        what, _, rest = message.partition(": ")
        if what == "unrecognized arguments" and rest.startswith("--"):
            name = re.split("[ =]", rest)[0]
            raise InputError(f"{name}: {unknown(name, self._option_string_actions, 'option')}")
        if what == "the following arguments are required":  # argparse counts those to which none may be given
            raise InputError(f"{rest.removesuffix(', overrides')}: missing; --help shows the command line")
        raise InputError(re.sub(r"^argument (--\w+)[^:]*", r"\1", message))


def checked(kind: Any) -> Callable[[str], Any]:
    """For the `type` of an argument: its value as a `kind` of hf_qie.runtime.rules."""

    def read(text: str) -> Any:
        try:
            return validate(kind, read_yaml(text, "value"), "value")
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error.args[-1])) from None

    return read


@contextmanager
def logged_from_any_rank() -> Iterator[None]:
    """Show what this process logs, whatever its rank."""
    logger = logging.getLogger("hf_qie")
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)


def run_script(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a script's `main` on the command line; an InputError, or a disk that does not take what is written, ends it
    with its message alone and exit status 1.

    Without arguments, or with -h or --help, the script's docstring is printed. Ranks other than 0 log warnings alone.
    """
    argv = sys.argv[1:]
    rank = os.environ.get("RANK", "0")
    is_first = os.environ.get("LOCAL_RANK", rank) == "0"
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")  # stays as it is where the caller has set it up
    logging.getLogger("hf_qie").setLevel(logging.INFO if rank == "0" else logging.WARNING)
    for name in UNHEEDED:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        if is_first:
            (sys.stdout if argv else sys.stderr).write(f"{main.__globals__['__doc__']}\n")
        sys.exit(0 if argv else 2)
    try:
        sys.exit(main(argv))
    except Exception as error:
        message = str(error) if isinstance(error, InputError) else disk_trouble(error)
        if message is None:
            raise
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun repeats it at the end of its own traceback
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
        if any(name in os.environ for name in LAUNCHED):
            message += "\nSee the error above; a traceback below is the launcher's."
        if not is_first:
            time.sleep(RANK_0_FIRST_S)  # the launcher ends all ranks when one ends
            message = f"rank {rank}: {message}"
        sys.stderr.write(f"{message}\n")
        sys.exit(1)
