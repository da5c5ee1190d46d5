"""Mean and standard deviation over images, in any split and order, and the same layer by layer."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vit_probe import InputError
from vit_probe.measures.base.running_stats import LayerStats, RunningStats


@given(
    parts=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(lambda parts: sum(parts) > 0),
    offset=st.sampled_from([0.0, 1e6]),
    seed=st.integers(0, 99),
    order=st.randoms(use_true_random=False),
)
def test_any_split_gives_the_moments_of_all_in_any_order(parts: list[int], offset: float, seed: int, order: Random) -> None:
    values = np.random.default_rng(seed).normal(size=(sum(parts), 2, 3)) + offset
    together, split = RunningStats.empty(2, 3), np.split(values, np.cumsum(parts)[:-1])
    order.shuffle(split)
    for rows in split:
        part = RunningStats.empty(2, 3)
        for row in rows:
            part.merge(RunningStats.from_samples(row[None]))
        together.merge(part)
    np.testing.assert_array_equal(together.count, np.full((2, 3), len(values)))
    np.testing.assert_allclose(together.mean, values.mean(axis=0), rtol=1e-12, atol=1e-12)
    if len(values) > 1:
        np.testing.assert_allclose(together.std(), values.std(axis=0, ddof=1), rtol=1e-6)
        _, high = stats.t.interval(0.95, len(values) - 1, loc=0, scale=stats.sem(values, axis=0))
        np.testing.assert_allclose(together.confidence(), high, rtol=1e-6)
    else:
        assert np.isnan(together.std()).all()
        assert np.isnan(together.confidence()).all()


# Layer by layer


def filled(images: int, *, shapes: tuple[tuple[int, ...], ...] = ((2,), (3,)), seed: int = 0) -> LayerStats:
    layers = LayerStats("values", per_image=True)
    add(layers, images, shapes=shapes, seed=seed)
    return layers


def add(layers: LayerStats, images: int, *, shapes: tuple[tuple[int, ...], ...] = ((2,), (3,)), seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    for layer, shape in enumerate(shapes):
        layers.add(
            layer, f"blocks.{layer}", {"a": random.normal(size=(images, *shape)), "b": np.full((images, 2), 7.0 + layer)}
        )


def test_what_a_layer_lacks_is_nan() -> None:
    averages = filled(4).averages()
    assert averages.num_images == 4
    assert {name: values.shape for name, values in averages.values.items()} == {"a": (2, 3), "b": (2, 2)}
    assert np.isnan(averages.values["a"]).tolist() == [[False, False, True], [False] * 3]
    assert averages.per_image["a"].shape == (4, 2, 3)
    np.testing.assert_allclose(averages.per_image["a"].mean(0), averages.values["a"])
    assert averages.values["b"].tolist() == [[7, 7], [8, 8]]


def test_rolling_back_returns_to_the_checkpoint_each_time() -> None:
    layers, before = filled(3), filled(3).averages()
    layers.set_checkpoint()
    for images in (2, 4):
        add(layers, images, seed=5)
        assert layers.averages().num_images == 3 + images
        layers.roll_back()
        assert layers.averages().num_images == 3
        for name in ("a", "b"):
            np.testing.assert_array_equal(layers.averages().values[name], before.values[name])
            np.testing.assert_array_equal(layers.averages().per_image[name], before.per_image[name])


def test_rolling_back_to_nothing() -> None:
    layers = LayerStats("values")
    layers.set_checkpoint()
    add(layers, 2)
    layers.roll_back()
    with pytest.raises(InputError, match="no values have been measured yet"):
        layers.averages()


def test_other_shapes_are_not_merged() -> None:
    layers, other = filled(3), filled(3, shapes=((2,), (4,)))
    with pytest.raises(
        InputError, match=r"cannot merge values: one has layers with values .*\(4,\).* measure images of one size"
    ):
        layers.merge(other)
    assert layers.averages().num_images == 3
    with pytest.raises(InputError, match="cannot merge values"):
        layers.merge(filled(3, shapes=((2,),)))


def test_layers_of_different_numbers_of_images() -> None:
    layers = filled(3)
    layers.add(1, "blocks.1", {"a": np.zeros((2, 3)), "b": np.zeros((2, 2))})
    with pytest.raises(InputError, match=r"the layers have seen different numbers of images \(3, 5\)"):
        layers.averages()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_told_at_once(value: float) -> None:
    layers = LayerStats("values")
    with pytest.raises(InputError, match="values are not all finite"):
        layers.add(0, "blocks.0", {"a": np.array([[1.0], [value]])})


def test_values_that_some_images_lack() -> None:
    values = np.ma.masked_invalid([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan], [8.0, np.nan]])
    layers = LayerStats("values", per_image=True)
    for part in np.split(values, [1, 3]):
        layers.add(0, "blocks.0", {"a": part, "b": np.ones((len(part), 1))})
    restored = LayerStats("values", per_image=True)
    restored.restore(layers.state())
    for averages in (layers.averages(), restored.averages()):
        assert averages.num_images == 4
        np.testing.assert_allclose(averages.values["a"], [[4, np.nan]])
        np.testing.assert_allclose(averages.std["a"], [[np.std([1, 3, 8], ddof=1), np.nan]])
        np.testing.assert_allclose(averages.confidence["a"], [[stats.t.interval(0.95, 2, 0, stats.sem([1, 3, 8]))[1], np.nan]])
        np.testing.assert_array_equal(averages.per_image["a"][:, 0], values.filled(np.nan))


@pytest.mark.parametrize(
    "later", [{"b": np.zeros((1, 2))}, {"a": np.zeros((1, 3))}, {}, {"a": np.zeros((1, 2)), "b": np.zeros(1)}]
)
def test_values_that_change_between_images(later: dict[str, np.ndarray]) -> None:
    layers = LayerStats("values")
    layers.add(0, "block", {"a": np.zeros((1, 2))})
    with pytest.raises(InputError, match=r"values in layer 0 have the shapes {.*, but those of earlier images had {'a': "):
        layers.add(0, "block", later)
