"""offset_measure: what its options do, and functions that it cannot use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.example_models import images, small_vit
from tests.measures.tiles import feed, random_attention, uniform_attention
from vit_probe import InputError, TokenGrid, load_result, mean_attention_distance, offset_measure
from vit_probe.measures.base.per_head import HeadResult

pytestmark = pytest.mark.usefixtures("own_registry")

GRID = TokenGrid(3, 4, (8, 6), 2, True)


def distance(dx: Tensor, dy: Tensor) -> Tensor:
    """Distance."""
    return torch.hypot(dx, dy)


def declared(function: Any, **options: Any) -> Any:
    return offset_measure(**({"unit": "pixels", "reference": "a test", "name": "tested"} | options))(function)


# Options of the decorator


def test_offsets_in_patches_are_those_in_pixels_divided_by_the_patch_size() -> None:
    seen = []

    def keep(dx: Tensor, dy: Tensor) -> Tensor:
        seen.append((dx, dy))
        return torch.zeros_like(dx)

    declared(keep).observer(GRID)
    declared(keep, offsets="patches").observer(GRID)
    (dx, dy), (cols, rows) = seen
    assert dx.dtype == dy.dtype == cols.dtype == torch.float64
    torch.testing.assert_close(dx, 6 * cols)
    torch.testing.assert_close(dy, 8 * rows)
    assert cols[0].tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert rows[:, 0].tolist() == [-2, -1, 0, 1, 2]


@pytest.mark.parametrize("offsets", ["pixels", "patches"])
def test_values_and_uniform_attention_take_the_same_offsets(offsets: Any) -> None:
    """In the means as in the value of uniform attention."""
    observer = declared(distance, offsets=offsets).observer(GRID)
    result = feed(observer, uniform_attention(GRID)).compute()
    np.testing.assert_allclose(result.tested, result.uniform_tested[:, None] * [1, 1], rtol=1e-6)
    expected = GRID.uniform_distance() if offsets == "pixels" else replace(GRID, patch_size=(1, 1)).uniform_distance()
    assert result.uniform_tested.tolist() == [pytest.approx(expected)] * 2


def test_names_and_labels() -> None:
    plain = offset_measure(unit="pixels", reference="a test")(distance)
    result = plain(small_vit(), images(), device="cpu")
    assert (result.measure, result.main, result.label, result.unit) == ("distance", "distance", "Distance", "pixels")
    assert list(result.to_dataframe())[3:8] == ["distance", "std", "confidence", "patch_mass", "uniform_distance"]
    assert result.plot().get_ylabel() == "Distance (pixels)"
    assert result.plot(kind="sorted").get_ylabel() == "Distance (pixels)"
    assert list(result.summary())[1] == "mean distance (pixels)"
    assert result.panel_title == "Distance\n(pixels)"
    named = declared(distance, unit="px", value="far", label="Reach of a head")
    result = named(small_vit(), images(), device="cpu")
    assert (result.measure, result.main, result.label) == ("tested", "far", "Reach of a head")
    assert result.plot().get_ylabel() == "Reach of a head (px)"
    np.testing.assert_array_equal(result.far, mean_attention_distance(small_vit(), images(), device="cpu").distance)


def test_the_figure_of_the_distance_is_labelled_as_in_the_paper() -> None:
    result = mean_attention_distance(small_vit(), images(), device="cpu")
    assert result.plot().get_ylabel() == "Mean attention distance (pixels)"


def test_a_result_class_of_ones_own(tmp_path: Any) -> None:
    @dataclass(frozen=True, eq=False, repr=False, kw_only=True)
    class OwnResult(HeadResult):
        @property
        def nearest(self) -> float:
            return float(self.tested.min())

    result = declared(distance, result=OwnResult)(small_vit(), images(), device="cpu")
    assert isinstance(result, OwnResult)
    assert result.nearest == result.tested.min()
    assert type(load_result(result.save(tmp_path / "own.safetensors"))) is OwnResult


def test_options_of_the_function_are_options_of_the_measure() -> None:
    def beyond(dx: Tensor, dy: Tensor, *, pixels: float = 10.0) -> Tensor:
        """Share of attention beyond some pixels."""
        return (torch.hypot(dx, dy) > pixels).double()

    far = declared(beyond, unit="share")
    attention = random_attention(GRID)
    results = [feed(far.observer(GRID, pixels=pixels), attention).compute() for pixels in (0.0, 10.0, 1000.0)]
    assert [result.options for result in results] == [
        {"pixels": pixels, "prefix": "renormalize"} for pixels in (0.0, 10.0, 1000.0)
    ]
    assert (results[0].tested > results[1].tested).all()
    assert (results[2].tested == 0).all()
    assert far(small_vit(), images(), pixels=-1.0, prefix="drop", device="cpu").tested.max() < 1


def test_the_class_token_counts_for_prefix_drop_only() -> None:
    one = declared(lambda dx, dy: torch.ones_like(dx))
    attention = random_attention(GRID)
    renormalized, dropped = (feed(one.observer(GRID, prefix=prefix), attention).compute() for prefix in ("renormalize", "drop"))
    np.testing.assert_allclose(renormalized.tested, 1, rtol=1e-6)
    np.testing.assert_allclose(dropped.tested, dropped.patch_mass, rtol=1e-6)
    np.testing.assert_allclose(dropped.patch_mass, attention[:, :, :, 2:, 2:].sum(-1).mean((1, 3)), rtol=1e-6)


# Functions that it cannot use: before the first image


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda dx, dy: dx[0], r"got a tensor of shape \(7,\)"),
        (lambda dx, dy: torch.stack([dx, dy]), r"got a tensor of shape \(2, 5, 7\)"),
        (lambda dx, dy: dx / dx, r"got a tensor of shape \(5, 7\) with numbers that are not finite"),
        (lambda dx, dy: {"dx": dx}, "got a dict"),
        (lambda dx, dy: None, "got a NoneType"),
    ],
)
def test_what_is_no_number_per_offset(function: Any, got: str) -> None:
    message = rf"must return one finite number per offset, a tensor of shape \(5, 7\); {got}"
    with pytest.raises(InputError, match=message):
        declared(function).observer(GRID)
    with pytest.raises(InputError, match=message):
        declared(function)(small_vit(), unread(), device="cpu")


def unread() -> Iterator[Tensor]:
    """A batch whose size must be known, and no more."""
    yield images(batch=1)
    raise AssertionError("no image is measured")


def test_an_unknown_prefix() -> None:
    with pytest.raises(InputError, match="prefix must be one of renormalize, drop; got 'keep'"):
        declared(distance).observer(GRID, prefix="keep")
