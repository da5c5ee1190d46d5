from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from tests.plots.overlap_checks import assert_apart, assert_inside
from vit_probe.errors import InputError
from vit_probe.plots import FORMATS, save_figure
from vit_probe.plots.receptive_field import plot_attention_beside_convolutions, plot_receptive_field


@pytest.fixture
def fields() -> pd.DataFrame:
    """A plain stack of 24 convolutions, and two convolutions with a pooling between them, whose receptive field is large."""
    plain = pd.DataFrame({"network": "plain", "layer": range(24), "depth": range(1, 25)})
    plain = plain.assign(receptive_field=1 + 2 * plain.depth, reach=plain.depth.astype(float), mean_distance=plain.depth**0.5)
    deep = pd.DataFrame({"network": "deep", "layer": [0, 1, 2], "depth": [1, 1, 40], "receptive_field": [11, 19, 401]})
    deep = deep.assign(reach=(deep.receptive_field - 1) / 2, mean_distance=[3.0, 5.0, 70.0])
    return pd.concat([plain, deep], ignore_index=True)


def _labels(legend: Legend | None) -> list[str]:
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def _lines_of_colour(axes: Axes, colour: object) -> list[Line2D]:
    return [line for line in axes.lines if line.get_color() == colour]


LEGEND = ["plain: 49 px wide", "deep: 401 px wide", "half the field", "mean, uniform kernels"]


def test_two_lines_per_network_that_start_at_one_pixel(fields: pd.DataFrame) -> None:
    axes = plot_receptive_field(fields)
    assert len(axes.lines) == 4
    for network, reach in zip(("plain", "deep"), axes.lines[::2], strict=True):
        rows = fields[fields.network == network]
        solid, dotted = _lines_of_colour(axes, reach.get_color())
        for line, column in ((solid, "reach"), (dotted, "mean_distance")):
            np.testing.assert_array_equal(line.get_xdata(), [0, *rows.depth][::-1])
            np.testing.assert_array_equal(line.get_ydata(), [0, *rows[column]][::-1])
        assert (solid.get_linestyle(), dotted.get_linestyle()) == ("-", "--")
    assert len({str(line.get_color()) for line in axes.lines}) == 2


def test_networks_are_distinguishable_without_colour(fields: pd.DataFrame) -> None:
    more = [fields[fields.network == "deep"].assign(network=name) for name in ("third", "fourth")]
    axes = plot_receptive_field(pd.concat([fields, *more]))
    markers = [line.get_marker() for line in axes.lines]
    assert markers[::2] == markers[1::2]
    assert len(set(markers)) == 4
    legend = axes.get_legend()
    assert legend is not None
    assert [handle.get_marker() for handle in legend.get_lines()] == [*markers[::2], "None", "None"]
    for line in axes.lines:
        assert isinstance(line.get_markevery(), float)  # spaced from the first point on, which is the last layer
        assert line.get_xdata()[0] == max(line.get_xdata())  # type: ignore[index, arg-type]


def test_an_arrow_marks_a_line_that_leaves_the_axes(fields: pd.DataFrame) -> None:
    assert not plot_receptive_field(fields).collections
    axes = plot_receptive_field(fields, highest=30)
    solid, dotted = axes.collections  # of "deep": from 9 px at 1 convolution to 200 px at 40, and from 5 px to 70 px
    np.testing.assert_allclose(solid.get_offsets(), [[1 + 39 * 21 / 191, 30]])
    np.testing.assert_allclose(dotted.get_offsets(), [[1 + 39 * 25 / 65, 30]])
    for arrow, line in zip((solid, dotted), axes.lines[2:], strict=True):
        np.testing.assert_array_equal(arrow.get_facecolor()[0, :3], to_rgb(line.get_color()))  # type: ignore[index]


def test_rows_in_any_order_are_drawn_layer_by_layer(fields: pd.DataFrame) -> None:
    shuffled = pd.concat([fields.iloc[:1], fields.iloc[1:].sample(frac=1, random_state=0)])
    for line, expected in zip(plot_receptive_field(shuffled).lines, plot_receptive_field(fields).lines, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), expected.get_xydata())


def test_labels_legend_and_limits(fields: pd.DataFrame) -> None:
    axes = plot_receptive_field(fields)
    assert axes.get_xlabel() == "Depth (convolutions)"
    assert axes.get_ylabel() == "Distance from the centre (pixels)"
    assert _labels(axes.get_legend()) == LEGEND
    assert axes.get_ylim() == (0, pytest.approx(210))
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 40
    assert plot_receptive_field(fields, highest=30).get_ylim() == (0, 30)


def test_a_network_of_single_pixels_can_be_drawn(fields: pd.DataFrame) -> None:
    axes = plot_receptive_field(fields.assign(depth=0, receptive_field=1, reach=0.0, mean_distance=0.0))
    assert axes.get_xlim()[1] >= 1
    assert axes.get_ylim()[1] > 0


def test_draws_on_the_given_axes(fields: pd.DataFrame) -> None:
    axes = Figure().subplots()
    assert plot_receptive_field(fields, ax=axes) is axes
    assert axes.lines


def test_heads_and_units_share_an_axis_of_pixels(frame: pd.DataFrame, fields: pd.DataFrame) -> None:
    figure = plot_attention_beside_convolutions(frame, fields)
    left, right = figure.axes[:2]
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] == 0
    assert 116.5 < left.get_ylim()[1] < 180  # set by the heads, not by the network that reaches 200 px
    assert left.get_shared_y_axes().joined(left, right)
    np.testing.assert_array_equal(left.collections[-1].get_offsets(), frame[["layer", "distance"]])
    assert left.get_ylabel() == "Mean attention distance (pixels)"
    assert right.get_ylabel() == "Distance from the centre (pixels)"
    assert [len(line.get_xdata()) for line in right.lines] == [25, 25, 4, 4]  # type: ignore[arg-type]
    assert figure.get_figwidth() == 5.5


def test_reference_lines_of_the_first_network_across_the_heads(frame: pd.DataFrame, fields: pd.DataFrame) -> None:
    figure = plot_attention_beside_convolutions(frame, fields)
    left, right = figure.axes[:2]
    half, mean, uniform = left.lines
    np.testing.assert_array_equal(half.get_ydata(), [24, 24])
    np.testing.assert_allclose(mean.get_ydata(), 24**0.5)
    assert half.get_color() == mean.get_color() == right.lines[0].get_color() != uniform.get_color()
    assert (half.get_linestyle(), mean.get_linestyle()) == ("-", "--")
    across, units = figure.legends
    assert _labels(across) == ["half the field of\nplain", "its mean, uniform kernels"]
    for handle, line in zip(across.get_lines(), (half, mean), strict=True):
        assert (handle.get_linestyle(), handle.get_color()) == (line.get_linestyle(), line.get_color())
    assert _labels(units) == LEGEND
    assert _labels(left.get_legend()) == ["uniform attention"]
    assert right.get_legend() is None


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_nothing_is_cut_off_and_nothing_overlaps(frame: pd.DataFrame, fields: pd.DataFrame, scale: float) -> None:
    scaled = frame.assign(distance=scale * frame.distance, uniform_distance=scale * frame.uniform_distance)
    names = {"plain": "24 x conv 3 x 3", "deep": "ResNet-50"}
    more = fields[fields.network == "deep"].assign(network="AlexNet"), fields[fields.network == "deep"].assign(network="VGG-16")
    figure = plot_attention_beside_convolutions(scaled, pd.concat([fields.replace({"network": names}), *more]))
    figure.draw_without_rendering()
    left, right = figure.axes[:2]
    boxes = [axes.get_tightbbox() for axes in (left, right)] + [legend.get_window_extent() for legend in figure.legends]
    assert_inside(figure, boxes)
    assert_apart(boxes)
    ticks = [label.get_window_extent() for label in right.get_xticklabels() if label.get_text()]
    assert_apart(ticks)
    legend = left.get_legend()
    assert legend is not None
    highest = max(scaled.distance.max(), scaled.uniform_distance.max())
    assert left.transData.transform((0, highest))[1] < legend.get_window_extent().y0
    below = [text for one in figure.legends for text in one.get_texts()]
    texts = [*legend.get_texts(), *below, left.title, right.title, left.yaxis.label, right.yaxis.label]
    assert min(text.get_fontsize() for text in texts) >= 8


def test_draws_on_the_given_figure(frame: pd.DataFrame, fields: pd.DataFrame) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    assert plot_attention_beside_convolutions(frame, fields, figure=figure) is figure
    assert len(figure.axes) >= 2


def test_saved_files_are_reproducible(frame: pd.DataFrame, fields: pd.DataFrame, tmp_path: Path) -> None:
    first = save_figure(plot_attention_beside_convolutions(frame, fields), tmp_path / "first", FORMATS)
    second = save_figure(plot_attention_beside_convolutions(frame, fields), tmp_path / "second", FORMATS)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_errors_say_what_arrived(frame: pd.DataFrame, fields: pd.DataFrame) -> None:
    wrong = r"lacks the columns depth, reach; pass to_dataframe\(\) of a result of receptive_field, or several"
    for draw in (plot_receptive_field, lambda table: plot_attention_beside_convolutions(frame, table)):
        with pytest.raises(InputError, match=wrong):
            draw(fields.drop(columns=["depth", "reach"]))
        with pytest.raises(InputError, match="the table of receptive fields has no rows; pass at least one layer"):
            draw(fields.iloc[:0])
    with pytest.raises(InputError, match="the table of heads by distance has no rows"):
        plot_attention_beside_convolutions(frame.iloc[:0], fields)
