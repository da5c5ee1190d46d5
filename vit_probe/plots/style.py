"""The style, size and file formats of every figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from vit_probe.atomic_io import write_bytes
from vit_probe.errors import InputError

__all__ = [
    "FORMATS",
    "OKABE_ITO",
    "WIDTHS",
    "drawing_axes",
    "figure_size",
    "fitting_text",
    "save_figure",
    "style",
    "text_inches",
]

FORMATS = ("png", "pdf", "svg")

WIDTHS = {
    "neurips": 5.5,
    "iclr": 5.5,
    "icml": 3.25,
    "icml-page": 6.75,
    "cvpr": 3.25,
    "cvpr-page": 6.875,
}
"""Column widths in inches; `-page` is the full width of a two-column page."""

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
"""Colours that readers with any common colour blindness can tell apart (Okabe & Ito 2008)."""

_DPI = 300
# None leaves an entry out of the file. Dates and versions of matplotlib would make equal figures differ in their bytes.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None, "Format": None, "Type": None},
}
_GREY = "#333333"
_RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so that figures look the same on every machine
    "font.size": 8,
    "mathtext.fontset": "dejavusans",
    "axes.titlesize": 9,
    "axes.titlepad": 5,
    "axes.labelsize": 8,
    "axes.labelpad": 3,
    "axes.linewidth": 0.6,
    "axes.edgecolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "white",
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=OKABE_ITO),
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.pad": 2.5,
    "ytick.major.pad": 2.5,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.handletextpad": 0.5,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.0,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.constrained_layout.h_pad": 0.03,
    "savefig.dpi": _DPI,
    "savefig.facecolor": "white",
    "savefig.bbox": None,
    "image.interpolation": "nearest",
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "vit_probe",
}


def style() -> AbstractContextManager[None]:
    """Context manager that sets matplotlib's parameters for a publication figure and restores them on exit.

    8 pt text and 9 pt titles, thin spines, TrueType fonts in PDF, colours safe for colour-blind readers.

    Examples:
        >>> import matplotlib as mpl
        >>> with style():
        ...     mpl.rcParams["axes.titlesize"]
        9.0
    """
    return mpl.rc_context(_RC)


def figure_size(width: str | float = "neurips", aspect: float = 0.618) -> tuple[float, float]:
    """Width and height of a figure, in inches.

    Args:
        width: A name in `WIDTHS`, or a number of inches.
        aspect: Height divided by width.

    Raises:
        InputError: If the name is unknown, or a number is not positive.

    Examples:
        >>> figure_size("icml", aspect=0.8)
        (3.25, 2.6)
    """
    if isinstance(width, str):
        if width not in WIDTHS:
            raise InputError(f"unknown column width {width!r}; choose from {', '.join(WIDTHS)}, or pass a number of inches")
        width = WIDTHS[width]
    if not (width > 0 and aspect > 0):
        raise InputError(f"cannot make a figure of width {width} and aspect {aspect}; both must be positive")
    return width, width * aspect


@contextmanager
def drawing_axes(
    ax: Axes | None, size: tuple[float, float], margins: tuple[float, float, float, float] | None = None
) -> Iterator[Axes]:
    """Yield the caller's axes, in the caller's style, or else new axes on a figure in `style()`.

    Args:
        ax: The caller's axes; None to create new ones.
        size: Width and height of the new figure, in inches.
        margins: Left, bottom, right and top margins of the new axes, in inches; if None, constrained layout sets them.
    """
    if ax is not None:
        yield ax
        return
    with style():
        if margins is None:
            yield Figure(figsize=size, layout="constrained").subplots()
        else:
            (width, height), (left, bottom, right, top) = size, margins
            box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
            yield Figure(figsize=size).add_axes(box)


def text_inches(text: str, points: float = 8) -> float:
    """Printed width of the widest line of a text in `style()`, rounded up a little."""
    with mpl.rc_context(_RC):
        widths = [TextPath((0, 0), line, size=points).get_extents().width for line in text.splitlines() if line.strip()]
    # Hinting on screen makes text a little wider than its outlines, hence 0.92.
    return float(max(widths, default=0.0)) / (0.92 * 72)


def fitting_text(text: str, inches: float, points: float = 8) -> str:
    """The text on one line, cut with an ellipsis where it is longer than `inches`; dollar signs do not start a formula."""
    shown = " ".join(text.split())
    with mpl.rc_context({"text.parse_math": False}):
        while len(shown) > 1 and text_inches(shown, points) > inches:
            shown = shown.removesuffix("…")[:-1].rstrip() + "…"
    return shown


def save_figure(figure: Figure, stem: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write a figure as `stem.png`, `stem.pdf` or `stem.svg`, reproducibly: equal figures give equal bytes.

    PNG files have 300 dots per inch, and so do the pictures inside PDF and SVG files.

    Args:
        figure: Figure to write; its size is kept.
        stem: Path without the file extension.
        formats: Any of `FORMATS`.

    Returns:
        The paths, in the order of `formats`.

    Raises:
        InputError: If a format is unknown (before anything is written), or the folder cannot be written to.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from matplotlib.figure import Figure
        >>> with TemporaryDirectory() as folder:
        ...     paths = save_figure(Figure(figsize=(1, 1)), Path(folder, "empty"), ["png", "svg"])
        >>> [path.name for path in paths]
        ['empty.png', 'empty.svg']
    """
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"cannot write a figure as {name!r}; choose from {', '.join(FORMATS)}")
    return [write_bytes(stem.with_name(f"{stem.name}.{name}"), _rendered(figure, name)) for name in formats]


def _rendered(figure: Figure, name: str) -> bytes:
    buffer = BytesIO()
    with style():
        figure.savefig(buffer, format=name, dpi=_DPI, metadata=_METADATA[name])
    return buffer.getvalue()
