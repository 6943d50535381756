"""What others may see of this machine's paths and URLs: what is needed to find an image again, and no more."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from hf_qie.config.recipe import Task
from hf_qie.data.schema import columns_of

URL = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^/?#]*@)?([^/?#]+[^?#]*).*", re.IGNORECASE | re.DOTALL)
# the folders of a path that starts at the root of a disk or at a home, wherever in a text it stands
FOLDERS = re.compile(r"""(?<![\w.~/\\-])(?:~\w*|[A-Za-z]:)?[/\\](?![/\\])(?:[^/\\\s'",;]+[/\\])+""")


def public_rows(table: pa.Table, roots: Sequence[Path]) -> pa.Table:
    """The same rows with paths and URLs as others may see them."""
    for image in columns_of("image"):
        index, field = table.column_names.index(image.name), table.schema.field(image.name)
        shown = [
            [public_path(path, roots) for path in value] if isinstance(value, list) else public_path(value, roots)
            for value in table[image.name].to_pylist()
        ]
        table = table.set_column(index, field, pa.array(shown, field.type))
    return table


def image_roots(task: Task) -> list[Path]:
    """Where the relative paths of a task's rows start: `image_root`, else the folders of `data` up to a wildcard."""
    if task.image_root:
        return [Path(task.image_root).absolute()]
    return [Path(re.split(r"[*?\[]", pattern)[0] + "_").absolute().parent for pattern in task.data]


def public_path(path: str | None, roots: Sequence[Path]) -> str | None:
    """A path relative to that of `roots` in which it lies, in none its last part; a URL without user and query."""
    if path is None:
        return None
    if url := URL.fullmatch(path):
        return url[1] + url[2]
    for root in roots:
        full = Path(os.path.normpath(root / path.removeprefix("file://")))
        if full.is_relative_to(root):
            return full.relative_to(root).as_posix()
    return Path(path).name


def public(value: Any) -> Any:
    """A recorded value without folders of this machine, and with its URLs without user and query.

    The folder of the images is left out: their paths are shown relative to it.
    """
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items() if key != "image_root"}
    if isinstance(value, list):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    if url := URL.fullmatch(value):
        return url[1] + url[2]
    if value.startswith(("/", "~", "..")):
        name = os.path.basename(value.rstrip("/"))
        return "~" if name == Path.home().name else name  # which is the user's
    return FOLDERS.sub("", value)


def reason_of(bad: Mapping[str, Any]) -> str:
    """Why a row was skipped, in words that rows with the same trouble share: no names, no numbers."""
    return re.sub(r"'[^']*'|0x[0-9a-f]+|\d[\d,.]*", "…", f"{bad['column']}: {public(bad['reason'])}")
