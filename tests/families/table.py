"""The README's table of model families, each row measured by running the family.

python -m tests.families.table    # rewrites the table
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

import tests.conftest  # noqa: F401  makes timm and torchvision importable
from tests.families import open_clip, timm, torchvision, transformers
from tests.families import torch as torch_modules
from tests.families.checks import TOLERANCE, deviation
from tests.families.family import Family
from vit_probe import InputError, attention_rollout, mean_attention_distance, patch_filters, position_similarity
from vit_probe.tokens.locate import locate_tokens

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- families -->", "<!-- /families -->"
LIBRARIES: list[ModuleType] = [timm, transformers, torchvision, open_clip, torch_modules]


def _attention_and_output(family: Family) -> str:
    largest = max(deviation(family))
    return f"≤ {TOLERANCE:.0e}".replace("e-0", "e-") if largest <= TOLERANCE else f"{largest:.0e}"


def _distance(family: Family) -> str:
    result = mean_attention_distance(family.model(), family.images())
    windows = result.num_windows > 1
    return "within windows" if windows.all() else "within windows, whole" if windows.any() else "whole"


def _rollout(family: Family) -> str:
    try:
        attention_rollout(family.model(), family.images())
    except InputError:
        return "refused"
    return "yes"


def _positions(family: Family) -> str:
    """`table` if position embeddings can be compared; `tokens` if tokens of a constant image can, after the last layer."""
    model, size = family.model(), family.sizes[0]
    kinds = []
    for kind, options in (("table", {}), ("tokens", {"image_size": size, "after_layers": len(family.layers)})):
        try:
            result = position_similarity(model, **options)
        except InputError:
            continue
        if (result.after_layers is None) == (kind == "table"):
            kinds.append(kind)
    return ", ".join(kinds) or "none"


def _patch_filters(family: Family) -> str:
    try:
        patch_filters(family.model())
    except InputError:
        return "refused"
    return "yes"


def _non_square(family: Family) -> str:
    sizes = [size for size in family.sizes if size[0] != size[1]]
    if not sizes:
        return "no: the library takes squares"
    return "yes" if all(locate_tokens(family.model(size), *size).grid == family.grid(size) for size in sizes) else "no"


def _prefix_tokens(family: Family) -> str:
    return str(locate_tokens(family.model(), *family.sizes[0]).grid.num_prefix_tokens)


COLUMNS = {
    "attention and output": _attention_and_output,
    "distance": _distance,
    "rollout": _rollout,
    "positions": _positions,
    "patch filters": _patch_filters,
    "non-square": _non_square,
    "prefix tokens": _prefix_tokens,
}


def render() -> str:
    """Return the table in Markdown."""
    header = ["library", "family", *COLUMNS]
    lines = [header, ["---"] * len(header)]
    with torch.random.fork_rng():
        for family in (family for library in LIBRARIES for family in library.FAMILIES if family.in_readme):
            lines.append([family.library, family.name, *(column(family) for column in COLUMNS.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def section(text: str) -> str:
    """Return the text between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must have one {BEGIN} and one {END}")
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    text = README.read_text(encoding="utf-8")
    old_table, new_table = section(text), render()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n{new_table}\n{END}{after}", encoding="utf-8")
    print("unchanged" if new_table == old_table else "rewritten")


if __name__ == "__main__":
    main()
