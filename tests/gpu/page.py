"""The section "On a GPU" of docs/performance.md, from the JSON file of a run."""

from collections.abc import Mapping
from typing import Any

from gpu.results import from_json, markdown

START, END = "<!-- make gpu -->\n", "<!-- end -->\n"
NONE_YET = "There are no figures yet: the command has not run on a GPU.\n"


def section(report: Mapping[str, Any]) -> str:
    """What stands between the two marks."""
    machine, seconds = report["machine"], report["seconds"]
    versions = ", ".join(f"{name} {one}" for name, one in machine["versions"].items())
    commit = f", commit {machine['commit'][:9]}" if machine["commit"] else ""
    memory = f" of {machine['memory_gb']:g} GB" if "memory_gb" in machine else ""
    head = (
        f"On {machine['when']}, {machine['count']} x {machine['device']}{memory}{commit}; {versions}; "
        f"{sum(seconds.values()):.0f} s in all.\n\n"
    )
    return head + markdown(map(from_json, report["results"]))


def fill(page: str, report: Mapping[str, Any]) -> str:
    """The page with the figures of that run in the place of what it had."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    assert start and end, f"the page has no {START.strip()} and {END.strip()}"
    return before + start + section(report) + end + after
