"""Run the studies, and write their findings into the gallery's page, `figures/README.md`, between its two markers.

python -m analyses.gallery
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from analyses.study import VERDICTS
from vit_probe.atomic_io import write_bytes
from vit_probe.cli.study import Format, run_study
from vit_probe.errors import InputError

__all__ = ["STUDIES", "page", "section"]

STUDIES = (
    "attention_distance",
    "patch_filters",
    "position_similarity",
    "rollout",
    "hybrid",
    "training_time",
    "trained_vs_random",
    "token_norms",
    "representation_similarity",
    "attention_entropy",
)
BEGIN, END = "<!-- studies -->", "<!-- /studies -->"


def section(name: str, folder: Path) -> str:
    """A study in Markdown: its picture, the docstring of its module, its finding, and its weights."""
    kept = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    title, _, rest = (import_module(f"analyses.{name}").__doc__ or "").strip().partition("\n\n")
    weights = ", ".join(dict.fromkeys(_weights(kept["provenance"])))
    verdict = VERDICTS[kept["as_published"]].capitalize()
    published = "\n".join(f"- {line}" for line in kept["published"])
    more = [f"[{path.name}]({path.name})" for path in sorted(folder.glob(f"{name}_*.csv"))]
    heading = name.replace("_", " ").capitalize()
    numbers = ", ".join([f"[{name}.csv]({name}.csv)", *more])
    finding = f"**{verdict}.** {kept['finding']} Numbers: {numbers}. Weights: {weights}."
    pictures = [f"![{heading}]({path.name})" for path in (folder / f"{name}.png", *sorted(folder.glob(f"{name}_*.png")))]
    return "\n\n".join([f"### {heading}", *pictures, " ".join(title.split()), rest.strip(), finding, published])


def page(text: str, folder: Path) -> str:
    """The gallery's page with the part between the markers replaced."""
    before, _, rest = text.partition(BEGIN)
    studies = "\n\n".join(section(name, folder) for name in STUDIES)
    return f"{before}{BEGIN}\n\n{studies}\n\n{END}{rest.partition(END)[2]}"


def _weights(provenance: Any) -> Iterator[str]:
    """The models in a provenance, at any depth, each with the first digits of its weights' hash."""
    if isinstance(provenance, dict):
        if "weights_sha256" in provenance:
            yield f"`{provenance.get('name', 'model')}` ({provenance['weights_sha256'][:8]})"
        for value in provenance.values():
            yield from _weights(value)


def main(out: Annotated[Path, typer.Option(help="Folder of the gallery.")] = Path("figures")) -> None:
    """Run every study on its default model, and write the gallery's page."""
    readme = out / "README.md"
    if not readme.is_file():
        raise InputError(f"there is no {readme}; run this in the root of a clone, or pass the folder of the gallery as --out")
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(
            f"{readme} must contain {BEGIN} and {END} once each, in this order; the studies are written between them"
        )
    for name in STUDIES:
        study = import_module(f"analyses.{name}").main
        options = inspect.signature(study, eval_str=True).parameters["options"].annotation
        study(options(out=out, format=[Format.png, Format.pdf]))
    write_bytes(readme, page(text, out).encode())


if __name__ == "__main__":
    run_study(main)
