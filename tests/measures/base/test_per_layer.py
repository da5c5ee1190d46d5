"""layer_measure: what its functions are given and may return, and results with layers of several sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.example_models import images, small_vit, swin
from tests.measures.tiles import Tokens
from vit_probe import InputError, TokenGrid, feature_spectrum, layer_measure
from vit_probe.runner.run import AttentionRun

pytestmark = pytest.mark.usefixtures("own_registry")


def declared(function: Any, **options: Any) -> Any:
    return layer_measure(**({"unit": "norm", "reference": "a test", "name": "tested"} | options))(function)


def test_the_tokens_and_the_grid_of_each_layer() -> None:
    seen: list[tuple[Tensor, TokenGrid]] = []

    def look(tokens: Tensor, grid: TokenGrid) -> dict[str, Tensor]:
        seen.append((tokens.clone(), grid))
        return {"tested": tokens[:, 0, 0]}

    model, x = swin(), images(48, 48, batch=2)
    result = declared(look)(model, x, device="cpu")
    AttentionRun(model, x, device="cpu").observe(expected := Tokens())
    assert [(grid.rows, grid.cols, tokens.shape[1]) for tokens, grid in seen] == [(12, 12, 144)] * 2 + [(6, 6, 36)] * 2
    for layer, (tokens, _) in enumerate(seen):
        np.testing.assert_array_equal(tokens, expected.of(layer))
    np.testing.assert_allclose(result.tested, [tokens[:, 0, 0].mean() for tokens, _ in seen], rtol=1e-6)


def test_names_and_labels() -> None:
    def token_norm(tokens: Tensor, grid: TokenGrid) -> dict[str, Tensor]:
        """Norm."""
        return {"mean_norm": tokens.norm(dim=-1).mean(-1), "largest": tokens.norm(dim=-1).amax(-1)}

    result = layer_measure(unit="norm", reference="a test")(token_norm)(small_vit(), images(), device="cpu")
    assert (result.measure, result.main, result.label, result.axis) == ("token_norm", "mean_norm", "Token norm", None)
    assert list(result.to_dataframe()) == ["layer", "module", "mean_norm", "std", "confidence", "largest", "num_images"]
    assert list(result.summary()) == ["layer", "mean norm (norm)", "largest"]
    assert result.plot().get_ylabel() == "Token norm (norm)"
    assert result.panel_title == "Token norm\n(norm)"
    numbers = {name: value for name, _, value in result.key_numbers()}
    assert numbers == {"after the first layer": result.mean_norm[0], "after the last layer": result.mean_norm[-1]}
    with pytest.raises(AttributeError, match="LayerResult of token_norm has no value 'cosine'"):
        _ = result.cosine


def test_values_along_an_axis() -> None:
    def channels(tokens: Tensor, grid: TokenGrid) -> dict[str, Tensor]:
        """Channels."""
        return {"tested": tokens.mean(1)}

    result = declared(channels, axis="channel", label="Mean channel")(small_vit(), images(), device="cpu")
    assert result.tested.shape == (2, 16)
    frame = result.to_dataframe()
    assert list(frame) == ["layer", "module", "channel", "tested", "std", "confidence", "num_images"]
    assert frame[["layer", "channel"]].to_numpy().tolist() == [[layer, channel] for layer in range(2) for channel in range(16)]
    np.testing.assert_array_equal(frame["tested"], result.tested.ravel())
    assert list(result.summary()) == ["layer", "channel 0", "channel 7", "channel 15"]
    axes = result.plot()
    assert (axes.get_xlabel(), axes.get_ylabel(), len(axes.lines)) == ("Channel", "Mean channel (norm)", 2)


def test_layers_of_fewer_entries_end_earlier() -> None:
    """A model that merges patches: seven frequencies of 12 x 12 patches, four of 6 x 6."""
    result = feature_spectrum(swin(), images(48, 48), device="cpu")
    there = ~np.isnan(result.feature_spectrum)
    assert there.sum(axis=1).tolist() == [7, 7, 4, 4]
    assert there[2].tolist() == [True] * 4 + [False] * 3
    frame = result.to_dataframe()
    assert frame.groupby("layer")["frequency"].max().tolist() == [6, 6, 3, 3]
    assert frame.notna().all(axis=None)
    first, last = (value for _, _, value in result.key_numbers())
    assert (first, last) == (result.feature_spectrum[0, 6], result.feature_spectrum[3, 3])


@pytest.mark.parametrize("axis", [None, "channel"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t, g: {"x": t.mean()}, r"the value 'x' of tested has shape \(\); all values must be \(3,"),
        (lambda t, g: {"x": t.mean((0, 2))}, r"the value 'x' of tested has shape \(12,\); all values must be \(3,"),
        (lambda t, g: {"x": t}, r"the value 'x' of tested has shape \(3, 12, 16\); all values must be \(3,"),
        (lambda t, g: t.mean((1, 2)), "must return a dictionary of named tensors; got Tensor"),
        (lambda t, g: {"layer": t.mean((1, 2))}, "a value is called 'layer'; names must be identifiers that begin neither"),
        (lambda t, g: {"x": 3}, "the value 'x' must be a tensor; got int"),
    ],
)
def test_what_a_function_may_not_return(function: Any, message: str, axis: str | None) -> None:
    with pytest.raises(InputError, match=message):
        declared(function, axis=axis)(small_vit(), images(), device="cpu")


def test_values_of_several_lengths() -> None:
    function = declared(lambda t, g: {"x": t.mean(1), "y": t.mean(2)}, axis="entry")
    with pytest.raises(InputError, match=r"the value 'y' of tested has shape \(3, 12\); all values must be"):
        function(small_vit(), images(), device="cpu")


def test_values_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="values of tested are not all finite"):
        declared(lambda t, g: {"x": t.mean((1, 2)) * torch.nan})(small_vit(), images(), device="cpu")
