from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from tests.plots.overlap_checks import assert_apart, assert_inside
from vit_probe import InputError
from vit_probe.plots.training_time import plot_training_time

TITLES = ["before training", "epoch 1", "epoch 16", "epoch 24"]


def states(titles: list[str]) -> tuple[dict[str, pd.DataFrame], dict[str, np.ndarray]]:
    layer, head = (index.ravel() for index in np.indices((4, 3)))
    random = np.random.default_rng(0)
    frames, maps = {}, {}
    for title in titles:
        columns = {"layer": layer, "head": head, "distance": random.uniform(5, 40, 12), "std": 1.0, "patch_mass": 0.8}
        frames[title] = pd.DataFrame(columns | {"uniform_distance": 33.0, "num_images": 4})
        vectors = random.normal(size=(16, 8))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        maps[title] = (vectors @ vectors.T).clip(-1, 1).reshape(4, 4, 4, 4)
    return frames, maps


def test_one_column_per_state() -> None:
    frames, maps = states(TITLES)
    figure = plot_training_time(frames, maps)
    above, below = figure.subfigs
    panels: list[tuple[Axes, Axes]] = list(zip(above.axes, below.axes, strict=True))
    assert [tuple(axes.get_title() for axes in pair) for pair in panels] == [(title, title) for title in TITLES]
    for (dots, tiles), frame, similarity in zip(panels, frames.values(), maps.values(), strict=True):
        np.testing.assert_array_equal(dots.collections[-1].get_offsets()[:, 1], frame["distance"])
        np.testing.assert_array_equal(np.ma.asarray(tiles.images[0].get_array())[:4, :4], similarity[0, 0])
    assert figure.get_figwidth() == 6.75


def test_texts_are_inside_the_figure_and_do_not_overlap() -> None:
    figure = plot_training_time(*states(TITLES))
    figure.draw_without_rendering()
    above, below = figure.subfigs
    texts = [axes.title for axes in (*above.axes, *below.axes)]
    texts += [above.axes[0].yaxis.label, below.axes[0].yaxis.label, above.axes[0].xaxis.label]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert_apart(boxes)
    assert_inside(figure, boxes)


def test_no_states_raise() -> None:
    with pytest.raises(InputError, match="there is no table of attention distances to draw"):
        plot_training_time({}, {})
