"""Aligned attention: one map per head with the query in its centre."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure

from vit_probe.errors import InputError
from vit_probe.plots.attention_offset import plot_aligned_attention


def maps(layers: int = 3, heads: int = 2, rows: int = 3, cols: int = 4) -> np.ndarray:
    return np.random.default_rng(0).random((layers, heads, 2 * rows - 1, 2 * cols - 1))


def test_one_image_per_head_in_rows_of_layers() -> None:
    aligned = maps()
    axes = plot_aligned_attention(aligned)
    assert len(axes.images) == 6
    for index, image in enumerate(axes.images):
        layer, head = divmod(index, 2)
        np.testing.assert_allclose(image.get_array(), np.sqrt(aligned[layer, head]))
        assert image.get_clim() == (0, pytest.approx(np.sqrt(aligned[layer, head].max())))
    lefts = np.array([image.get_extent()[0] for image in axes.images]).reshape(3, 2)
    tops = np.array([image.get_extent()[3] for image in axes.images]).reshape(3, 2)
    assert (np.diff(lefts, axis=1) > 0).all()
    assert np.ptp(lefts, axis=0).max() == 0
    assert (np.diff(tops, axis=0) > 0).all()
    assert np.ptp(tops, axis=1).max() == 0
    low, high = axes.get_ylim()
    assert low > high  # layer 0 at the top
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Head", "Network depth (layer)")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "2"]


def test_maps_do_not_overlap_and_their_pixels_are_square() -> None:
    axes = plot_aligned_attention(maps())
    axes.figure.draw_without_rendering()
    boxes = [image.get_window_extent() for image in axes.images]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    for box in boxes:
        assert box.height / box.width == pytest.approx(5 / 7)


def test_a_cross_marks_the_query() -> None:
    axes = plot_aligned_attention(maps())
    assert len(axes.lines) == 6
    for image, cross in zip(axes.images, axes.lines, strict=True):
        left, right, bottom, top = image.get_extent()
        assert (cross.get_marker(), cross.get_color()) == ("+", "white")
        np.testing.assert_allclose(cross.get_xydata(), [[(left + right) / 2, (bottom + top) / 2]])


def test_a_choice_of_layers_in_the_order_given() -> None:
    aligned = maps()
    axes = plot_aligned_attention(aligned, layers=[2, 0])
    np.testing.assert_allclose(axes.images[0].get_array(), np.sqrt(aligned[2, 0]))
    np.testing.assert_allclose(axes.images[3].get_array(), np.sqrt(aligned[0, 1]))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["2", "0"]


def test_heads_that_a_layer_lacks_are_left_out() -> None:
    aligned = maps()
    aligned[1, 1] = np.nan
    axes = plot_aligned_attention(aligned)
    assert len(axes.images) == 5
    np.testing.assert_allclose(axes.images[3].get_array(), np.sqrt(aligned[2, 0]))


def test_smaller_maps_of_later_layers_are_cut_to_their_size() -> None:
    """A model that merges patches has maps of several sizes; the table is filled with NaN."""
    aligned = maps(layers=2)
    aligned[1, :, 3:] = aligned[1, :, :, 5:] = np.nan
    axes = plot_aligned_attention(aligned)
    for head in range(2):
        np.testing.assert_allclose(axes.images[2 + head].get_array(), np.sqrt(aligned[1, head, :3, :5]))
        left, right, bottom, top = axes.images[2 + head].get_extent()
        np.testing.assert_allclose(axes.lines[2 + head].get_xydata(), [[(left + right) / 2, (bottom + top) / 2]])


def test_draws_on_the_axes_it_is_given() -> None:
    axes = Figure().subplots()
    assert plot_aligned_attention(maps(), ax=axes) is axes
    assert axes.images


def test_errors_say_what_arrived() -> None:
    with pytest.raises(InputError, match=r"axes \(layer, head, row offset, col offset\), got shape \(2, 5, 7\)"):
        plot_aligned_attention(maps()[:, 0][:2])
    with pytest.raises(InputError, match=r"got shape \(0, 2, 5, 7\)"):
        plot_aligned_attention(maps()[:0])
    for layers in ([3], [-1], []):
        with pytest.raises(InputError, match=r"layers \[.*\] were asked for, but there are layers 0 to 2; name some of those"):
            plot_aligned_attention(maps(), layers=layers)
