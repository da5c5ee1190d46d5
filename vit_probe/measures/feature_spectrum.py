"""Feature spectrum: which spatial frequencies the patch tokens hold after each block."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vit_probe.errors import InputError
from vit_probe.measures.base.per_layer import layer_measure
from vit_probe.measures.base.reduce import wide
from vit_probe.tokens.grid import TokenGrid

__all__ = ["feature_spectrum"]

_FLOOR = 1e-6  # added to amplitudes before the logarithm, as in the authors' code


@layer_measure(
    unit="log amplitude", reference="arXiv:2202.06709", axis="frequency", axis_label="Frequency (waves per shorter side)"
)
def feature_spectrum(
    tokens: Float[Tensor, "image patch dim"], grid: TokenGrid, *, profile: Literal["radial", "diagonal"] = "radial"
) -> dict[str, Tensor]:
    """Log amplitude of the patch tokens' two-dimensional Fourier transform, by frequency, after each block.

    The tokens after a block's residual connections are laid out on their grid and transformed channel by channel. The logarithm
    of the amplitude is averaged over channels and then read along a profile of frequencies; the value of the lowest frequency
    is subtracted, so that 0 is the amplitude of the mean token. A steep fall means smooth features; the paper finds that
    self-attention is a low-pass filter and convolutions are high-pass filters.

    Args:
        profile: `radial` averages over rings of equal frequency, entry k being the frequency of k waves across the shorter side
            of the grid; it holds for any grid, up to the highest frequency that both directions have. `diagonal` reads one half
            of the diagonal of square grids, as the authors' code does.

    Returns:
        A `LayerResult`: `feature_spectrum` (layer, frequency) with its spread over images.

    Raises:
        InputError: If `diagonal` is asked for of a grid that is not square, the images cannot be used, or the blocks of the
            model cannot be told apart.

    References:
        Park & Kim 2022, How Do Vision Transformers Work?, arXiv:2202.06709, figures 2a and 8.

    Examples:
        >>> from vit_probe import feature_spectrum, load_model
        >>> feature_spectrum(load_model("demo"), torch.rand(1, 3, 64, 64)).feature_spectrum.shape
        (9, 5)
    """
    rows, cols = grid.rows, grid.cols
    if profile == "diagonal" and rows != cols:
        raise InputError(
            f"the diagonal of frequencies needs a square grid, got {rows} x {cols} patches; choose profile='radial'"
        )
    features = tokens.to(wide(tokens.device)).unflatten(1, (rows, cols))
    amplitudes = (torch.fft.fft2(features, dim=(1, 2)).abs() + _FLOOR).log().mean(dim=-1)
    if profile == "diagonal":
        spectrum = torch.fft.fftshift(amplitudes, dim=(1, 2)).diagonal(dim1=1, dim2=2)[:, rows // 2 :]
    else:
        side = min(rows, cols)
        # Frequencies in waves across the shorter side; rings up to the highest frequency along both axes.
        # Whole numbers first, so that half a wave is exactly half and falls into the same ring on every grid.
        waves_y, waves_x = (
            torch.fft.fftfreq(length, 1 / length, dtype=torch.float64).round() * side / length for length in (rows, cols)
        )
        ring = torch.hypot(waves_y[:, None], waves_x[None, :]).round().long().flatten()
        inside = (ring <= side // 2).to(amplitudes.device)
        sums = amplitudes.new_zeros(len(tokens), side // 2 + 1)
        ring = ring.clamp_max(side // 2).to(amplitudes.device)
        sums.index_add_(1, ring, amplitudes.flatten(1) * inside)
        counts = torch.bincount(ring, weights=inside.double(), minlength=side // 2 + 1)
        spectrum = sums / counts.to(sums)
    return {"feature_spectrum": spectrum - spectrum[:, :1]}
