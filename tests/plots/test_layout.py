from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from vit_probe.errors import InputError
from vit_probe.plots.layout import (
    arrange,
    check_columns,
    check_rows,
    hide_ticks_and_spines,
    inches_per_pixel,
    mosaic,
    tile_centres,
)


def test_mosaic_places_every_tile_and_fills_the_gaps() -> None:
    tiles = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    picture = mosaic(tiles, gap=(2, 1), fill=-1)
    assert picture.shape == (10, 17)
    for row in range(2):
        for col in range(3):
            np.testing.assert_array_equal(picture[row * 6 : row * 6 + 4, col * 6 : col * 6 + 5], tiles[row, col])
    assert (picture == -1).sum() == picture.size - tiles.size


def test_mosaic_keeps_channels_and_dtype() -> None:
    picture = mosaic(np.zeros((1, 2, 3, 3, 3), dtype=np.uint8), gap=(1, 1), fill=255)
    assert picture.shape == (3, 7, 3)
    assert picture.dtype == np.uint8
    assert (picture[:, 3] == 255).all()


def test_arrange_fills_the_last_row() -> None:
    rows = arrange(np.arange(1, 6, dtype=float).reshape(5, 1, 1), 3, fill=0.0)
    np.testing.assert_array_equal(rows[..., 0, 0], [[1, 2, 3], [4, 5, 0]])


def test_tile_centres_are_in_pixel_coordinates() -> None:
    np.testing.assert_array_equal(tile_centres(3, 5, 1), [2, 8, 14])
    np.testing.assert_array_equal(tile_centres(2, 4, 2), [1.5, 7.5])


def test_inches_per_pixel_is_that_of_the_tighter_side() -> None:
    axes = Figure(figsize=(4, 2), dpi=77).add_axes((0, 0, 1, 1))
    assert np.isclose(inches_per_pixel(axes, 10, 100), 0.04)
    assert np.isclose(inches_per_pixel(axes, 100, 10), 0.02)


def test_hidden_axes_have_neither_ticks_nor_spines() -> None:
    axes = Figure().subplots()
    hide_ticks_and_spines(axes)
    assert len(axes.get_xticks()) == len(axes.get_yticks()) == 0
    assert not any(spine.get_visible() for spine in axes.spines.values())


def test_checks_of_tables_name_what_is_missing() -> None:
    frame = pd.DataFrame({"layer": [0], "head": [0]})
    check_columns(frame, ["layer"], "the table", "pass another")
    check_rows(frame, "the table", "pass another")
    with pytest.raises(InputError, match=r"^the table lacks the columns distance, std; pass another$"):
        check_columns(frame, ["layer", "distance", "std"], "the table", "pass another")
    with pytest.raises(InputError, match=r"^the table has no rows; pass another$"):
        check_rows(frame.iloc[:0], "the table", "pass another")
