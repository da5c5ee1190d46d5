from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vit_probe.errors import InputError
from vit_probe.plots import FORMATS, WIDTHS, figure_size, save_figure, style
from vit_probe.plots.style import OKABE_ITO, drawing_axes, fitting_text


def _figure() -> Figure:
    with style():
        figure = Figure(figsize=(2, 1), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [1, 0], marker="o", label="line")
        axes.scatter([0, 1], [0, 1], c=[0.2, 0.8])
        axes.imshow(np.eye(3), extent=(0, 1, 0, 1))
        axes.legend()
    return figure


def test_style_holds_inside_the_block_only() -> None:
    before = mpl.rcParams.copy()
    with style():
        assert mpl.rcParams["font.size"] == 8
        assert mpl.rcParams["axes.titlesize"] == 9
        assert mpl.rcParams["pdf.fonttype"] == 42
        assert mpl.rcParams["svg.hashsalt"] == "vit_probe"
        assert mpl.rcParams["axes.prop_cycle"].by_key()["color"] == list(OKABE_ITO)
    assert mpl.rcParams == before


def test_style_is_restored_after_an_exception() -> None:
    before = mpl.rcParams.copy()
    with pytest.raises(RuntimeError, match="inside"), style():
        raise RuntimeError("inside")
    assert mpl.rcParams == before


@pytest.mark.parametrize(("name", "inches"), [("neurips", 5.5), ("iclr", 5.5), ("icml", 3.25), ("cvpr-page", 6.875)])
def test_figure_size_of_a_venue(name: str, inches: float) -> None:
    assert figure_size(name, 0.5) == (inches, inches / 2)


def test_figure_size_in_inches() -> None:
    assert figure_size(4.0, 2.0) == (4.0, 8.0)


def test_figure_size_of_an_unknown_venue_raises() -> None:
    with pytest.raises(
        InputError, match=r"unknown column width 'nature'; choose from neurips, .*cvpr-page, or pass a number of inches"
    ):
        figure_size("nature")


@pytest.mark.parametrize(("width", "aspect"), [(0.0, 1.0), (3.0, -1.0), (float("nan"), 1.0)])
def test_figure_size_must_be_positive(width: float, aspect: float) -> None:
    with pytest.raises(InputError, match=f"width {width} and aspect {aspect}; both must be positive"):
        figure_size(width, aspect)


def test_drawing_axes_yields_the_callers_axes_in_the_callers_style() -> None:
    own = Figure().subplots()
    size = mpl.rcParams["font.size"]
    with drawing_axes(own, (9, 9)) as axes:
        assert axes is own
        assert mpl.rcParams["font.size"] == size


def test_drawing_axes_places_new_axes_by_their_margins() -> None:
    with drawing_axes(None, (4, 2), (0.4, 0.2, 0.6, 0.8)) as axes:
        assert mpl.rcParams["font.size"] == 8
    assert tuple(axes.figure.get_size_inches()) == (4, 2)
    np.testing.assert_allclose(axes.get_position().bounds, (0.1, 0.1, 0.75, 0.5))


def test_fitting_text_keeps_what_fits_and_shortens_the_rest() -> None:
    assert fitting_text("tabby cat", 2.0) == "tabby cat"
    short = fitting_text("a photograph with a long description", 1.0)
    assert short.startswith("a photo")
    assert short.endswith("…")
    assert len(short) < 25
    assert len(fitting_text("a photograph with a long description", 1.5)) > len(short)


def test_saved_files_are_of_their_format_and_size(tmp_path: Path) -> None:
    paths = save_figure(_figure(), tmp_path / "vit_b.16", FORMATS)
    assert [path.name for path in paths] == ["vit_b.16.png", "vit_b.16.pdf", "vit_b.16.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    picture = Image.open(paths[0])
    assert picture.size == (600, 300)
    assert round(picture.info["dpi"][0]) == 300
    assert paths[1].read_bytes().startswith(b"%PDF")
    assert b"<svg" in paths[2].read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_figure_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    first, second = (save_figure(_figure(), tmp_path / stem, [name])[0].read_bytes() for stem in ("a", "b"))
    assert first == second
    for word in (b"Date", b"date>", b"Matplotlib v", b"matplotlib v", mpl.__version__.encode() + b","):
        assert word not in first


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from tests.plots.test_style import _figure; from vit_probe.plots import save_figure, FORMATS;"
        "save_figure(_figure(), pathlib.Path(sys.argv[1]), FORMATS)"
    )
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "theirs")],
        check=True,
        cwd=root,
        env={"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "0", "PYTHONPATH": str(root), "HOME": str(tmp_path)},
    )
    for path in save_figure(_figure(), tmp_path / "ours", FORMATS):
        assert path.read_bytes() == path.with_name(path.name.replace("ours", "theirs")).read_bytes()


def test_an_unknown_format_raises_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="as 'jpg'; choose from png, pdf, svg"):
        save_figure(_figure(), tmp_path / "figure", ["png", "jpg"])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old,) = save_figure(_figure(), tmp_path / "figure", ["png"])
    content = old.read_bytes()

    def half_written(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(InputError, match=r"cannot write .*figure.png: No space left on device; choose a folder"):
        save_figure(_figure(), tmp_path / "figure", ["png"])
    assert old.read_bytes() == content
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("folder", ["file", "missing"])
def test_a_folder_that_cannot_be_written_is_an_input_error(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose a folder that exists and is writable"):
        save_figure(_figure(), tmp_path / folder / "figure", ["svg"])


def test_widths_are_those_of_real_columns() -> None:
    assert WIDTHS["icml-page"] == 6.75
    assert min(WIDTHS.values()) == 3.25
