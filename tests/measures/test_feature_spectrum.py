"""Feature spectrum: single waves, rings, the diagonal, and grids of one patch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.example_models import images, small_vit
from tests.measures.tiles import of_tokens
from vit_probe import InputError, feature_spectrum


@pytest.mark.parametrize(("rows", "cols"), [(9, 18), (18, 9), (4, 6), (5, 5), (12, 24)])
def test_rings_of_the_spectrum(rows: int, cols: int) -> None:
    """A single wave lies in the ring of its frequency; half a wave goes to the even number on every grid."""
    side = min(rows, cols)
    row, col = torch.arange(rows).double() / rows, torch.arange(cols).double() / cols
    for down, right in ((1, 0), (0, 1), (rows // 3, cols // 3), (0, 7), (7, 0)):
        if down > rows // 2 or right > cols // 2:
            continue
        wave = torch.cos(2 * torch.pi * (down * row[:, None] + right * col))
        spectrum = of_tokens(feature_spectrum, (1 + wave).reshape(1, -1, 1), rows, cols)[0]
        squared = (down * side / rows) ** 2 + (right * side / cols) ** 2
        ring = round(squared**0.5)
        assert len(spectrum) == side // 2 + 1
        if 0 < ring <= side // 2:
            assert spectrum[1:].argmax() == ring - 1, (down, right)


def test_the_diagonal_of_a_square_grid() -> None:
    tokens = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    amplitude = np.log(np.abs(np.fft.fft2(tokens.numpy().reshape(2, 4, 4, 3), axes=(1, 2))) + 1e-6).mean(-1)
    expected = np.stack([amplitude[:, 0, 0], amplitude[:, 1, 1]], axis=1)
    found = of_tokens(feature_spectrum, tokens, 4, 4, profile="diagonal")
    np.testing.assert_allclose(found, expected - expected[:, :1], atol=1e-10)
    with pytest.raises(InputError, match=r"the diagonal of frequencies needs a square grid, got 2 x 8 patches; choose prof"):
        of_tokens(feature_spectrum, tokens, 2, 8, profile="diagonal")


def test_a_constant_image_has_the_lowest_frequency_alone() -> None:
    spectrum = of_tokens(feature_spectrum, torch.full((1, 16, 3), 2.0), 4, 4)[0]
    assert spectrum.tolist() == [0, pytest.approx(np.log(1e-6 / 32), rel=1e-6), pytest.approx(np.log(1e-6 / 32), rel=1e-6)]


def test_half_precision_does_not_overflow() -> None:
    tokens = torch.full((1, 4, 300), 6e4, dtype=torch.float16)
    assert of_tokens(feature_spectrum, tokens, 2, 2)[0, 0] == 0


def test_a_single_patch_has_one_frequency() -> None:
    assert of_tokens(feature_spectrum, torch.ones(1, 1, 4), 1, 1).tolist() == [[0]]


def test_the_figure_has_one_line_per_layer_over_frequencies() -> None:
    axes = feature_spectrum(small_vit(), images(), device="cpu").plot()
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 1], [0, 1]]  # type: ignore[union-attr]
