"""Running several measures in one pass, and what is no measure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vit_probe
from tests.example_models import images, small_vit
from tests.measures.tiles import arrays_of
from vit_probe import (
    InputError,
    attention_entropy,
    attention_rollout,
    feature_spectrum,
    local_mass,
    mean_attention_distance,
    measure,
    offset_measure,
    position_similarity,
    token_similarity,
)
from vit_probe.measures.base.head_measure import HeadMeasure
from vit_probe.measures.base.registry import MeasureSpec, registered, spec_of

pytestmark = pytest.mark.usefixtures("own_registry")

SEVERAL: list[Callable[..., Any]] = [
    local_mass,
    position_similarity,
    partial(local_mass, radius=2.5),
    feature_spectrum,
    partial(attention_rollout, head_fusion="max"),
    attention_entropy,
]


def passes_over(model: nn.Module, x: Tensor, work: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What the work returns, and the sizes of the batches of these images that the model was shown."""
    batches: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        if any(torch.equal(args[0][0].float(), image) for image in x):  # not the coded images that locate tokens
            batches.append(len(args[0]))

    hook = model.register_forward_pre_hook(count)
    try:
        return work(), batches
    finally:
        hook.remove()


def test_several_measures_share_one_forward_pass_of_each_image() -> None:
    model, x = small_vit().double(), images(batch=5)
    results, batches = passes_over(model, x, lambda: measure(model, x, SEVERAL, batch_size=2, device="cpu"))
    assert batches == [2, 2, 1]
    assert [result.measure for result in results] == [
        *("local_mass", "position_similarity", "local_mass", "feature_spectrum", "rollout", "attention_entropy")
    ]
    for function, result in zip(SEVERAL, results, strict=True):
        alone = function(model) if function is position_similarity else function(model, x, batch_size=2, device="cpu")
        assert result.provenance == alone.provenance
        assert list(arrays_of(result)) == list(arrays_of(alone))
        for name, values in arrays_of(alone).items():
            np.testing.assert_allclose(
                arrays_of(result)[name], values, rtol=1e-6 if values.dtype == np.float32 else 1e-9, atol=1e-9
            )
    assert results[2].options["radius"] == 2.5
    assert (results[2].local_mass > results[0].local_mass).all()


def test_the_arguments_of_a_run() -> None:
    model, x = small_vit(), images(batch=3)
    grid = model.token_grid(24, 24)
    (result,) = measure(model, iter(x.split(1)), [mean_attention_distance], grid=grid, device="cpu")
    assert result.num_images == 3
    with pytest.raises(InputError, match=r"TokenGrid\(rows=4"):
        measure(model, x, [mean_attention_distance], grid=vit_probe.TokenGrid(4, 3, (8, 6), 1, True), device="cpu")
    with pytest.raises(InputError, match="device 'abacus' is not available"):
        measure(model, x, [mean_attention_distance], device="abacus")


def test_weights_alone_need_no_images() -> None:
    model = small_vit()
    ((result,), batches) = passes_over(model, images(), lambda: measure(model, images(), [position_similarity]))
    assert batches == []
    np.testing.assert_array_equal(result.similarity, position_similarity(model).similarity)


def test_no_measures_have_no_results() -> None:
    assert measure(small_vit(), images(), []) == []


def test_values_of_single_images_are_kept_where_there_are_any() -> None:
    chosen = [mean_attention_distance, attention_rollout, token_similarity, position_similarity]
    distance, rollout, alike, _ = measure(small_vit(), images(), chosen, per_image=True, device="cpu")
    assert distance.per_image["distance"].shape == (3, 2, 2)
    assert alike.per_image["token_similarity"].shape == (3, 2)
    assert "per_image" not in rollout.provenance["options"]
    some, none = measure(small_vit(), images(), [partial(local_mass, per_image=True), local_mass], device="cpu")
    assert (list(some.per_image), list(none.per_image)) == (["local_mass", "patch_mass", "excluded"], [])


# What is no measure


@pytest.mark.parametrize(
    "given",
    [
        "attention_distance",
        None,
        print,
        partial(print, sep=""),
        lambda model, images: None,
        HeadMeasure,
        vit_probe.measure,
        vit_probe.measures,
        vit_probe.overview,
        partial(mean_attention_distance, small_vit()),
    ],
)
def test_what_is_no_measure(given: Any) -> None:
    with pytest.raises(
        InputError, match=r"measures are functions such as mean_attention_distance, or functools\.partial of one"
    ):
        measure(small_vit(), images(), [given])


def test_unknown_options_name_the_known_ones() -> None:
    with pytest.raises(InputError, match="local_mass has no option prefxi, radios; it has radius, prefix, per_image"):
        measure(small_vit(), images(), [partial(local_mass, radios=1, prefxi="drop")])
    with pytest.raises(InputError, match="representation_similarity has no option other; it has keep"):
        measure(small_vit(), images(), [partial(vit_probe.representation_similarity, other=small_vit())])
    with pytest.raises(TypeError, match="radios"):
        local_mass(small_vit(), images(), radios=1)


def test_a_choice_that_there_is_not() -> None:
    for call in (
        lambda: feature_spectrum(small_vit(), images(), profile="odd"),
        lambda: measure(small_vit(), images(), [partial(feature_spectrum, profile="odd")]),
    ):
        with pytest.raises(InputError, match="profile must be one of radial, diagonal; got 'odd'"):
            call()
    with pytest.raises(InputError, match="prefix must be one of renormalize, drop; got 'keep'"):
        measure(small_vit(), images(), [partial(local_mass, prefix="keep")])


# Specifications


def test_partial_of_a_measure_gives_its_options() -> None:
    spec, options = spec_of(partial(partial(local_mass, radius=2.0), prefix="drop"))
    assert spec is registered()["local_mass"] is local_mass.spec
    assert options == {"radius": 2.0, "prefix": "drop", "per_image": False}
    assert spec.options == {"radius": 1.5, "prefix": "renormalize", "per_image": False}


def test_a_measure_of_a_user_is_registered_with_its_choices() -> None:
    @offset_measure(unit="pixels", reference="a test", name="one_axis")
    def along_an_axis(dx: Tensor, dy: Tensor, *, axis: Literal["x", "y"] = "x") -> Tensor:
        """Distance along an axis."""
        return dx.abs() if axis == "x" else dy.abs()

    spec = registered()["one_axis"]
    assert isinstance(spec, MeasureSpec)
    assert spec.function is along_an_axis
    assert spec.options == {"axis": "x", "prefix": "renormalize", "per_image": False}
    assert (along_an_axis.__name__, along_an_axis.__module__) == ("along_an_axis", __name__)
    assert along_an_axis.reference == "a test"
    one, other = measure(small_vit(), images(), [along_an_axis, partial(along_an_axis, axis="y")], device="cpu")
    assert (one.measure, one.main, one.options["axis"], other.options["axis"]) == ("one_axis", "one_axis", "x", "y")
    assert abs(one.one_axis - other.one_axis).min() > 0.1
    with pytest.raises(InputError, match="axis must be one of x, y; got 'z'"):
        along_an_axis(small_vit(), images(), axis="z")


def test_a_users_measure_may_be_defined_again() -> None:
    """As when the cell of a notebook runs again: the last definition counts."""
    declare = offset_measure(unit="pixels", reference="a test", name="defined_again")
    first, second = declare(lambda dx, dy: dx.abs()), declare(lambda dx, dy: dy.abs())
    assert registered()["defined_again"].function is second
    one, other = measure(small_vit(), images(), [first, second], device="cpu")
    assert abs(one.defined_again - other.defined_again).min() > 0.1


def test_images_are_kept_for_measures_that_show_them() -> None:
    from vit_probe import Preprocessing

    model = small_vit()
    model.preprocessing = Preprocessing(size=(24, 24), resize=24)
    _, rollout = measure(model, images(), [local_mass, attention_rollout], device="cpu")
    assert rollout.images.shape == (3, 24, 24, 3)
