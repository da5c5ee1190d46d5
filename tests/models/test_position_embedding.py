"""Position embeddings against their literal definitions, and resizing against the libraries that also do it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests import reference
from vit_probe.errors import InputError
from vit_probe.models.position_embedding import LearnedPosition2d, resize_position_embedding, sincos_position_embedding

timm = pytest.importorskip("timm")

GRIDS = [
    ((6, 6), (9, 9)),
    ((6, 6), (4, 4)),
    ((6, 6), (3, 11)),
    ((4, 9), (7, 5)),
    ((4, 9), (9, 4)),
    ((5, 5), (1, 1)),
]
NARROW = [((4, 4), (2, 1)), ((4, 1), (2, 1)), ((3, 5), (1, 4))]  # where torch's own antialiasing may be wrong
RESAMPLING: dict[str, dict[str, Any]] = {
    "bicubic-antialias": {"antialias": True}, "bicubic": {}, "bicubic-align-corners": {"align_corners": True}
}  # fmt: skip


def table(tokens: int, dim: int = 5) -> torch.Tensor:
    return torch.randn(1, tokens, dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("resampling", RESAMPLING)
@pytest.mark.parametrize(("old", "new"), GRIDS + NARROW)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_resizing_is_the_literal_interpolation(
    old: tuple[int, int], new: tuple[int, int], prefix: int, resampling: Any
) -> None:
    before = table(prefix + old[0] * old[1])
    after = resize_position_embedding(before, old, new, num_prefix_tokens=prefix, resampling=resampling)
    assert torch.equal(after[:, :prefix], before[:, :prefix])
    literal = reference.bicubic_resize(before[0, prefix:].reshape(*old, 5).numpy(), *new, **RESAMPLING[resampling])
    np.testing.assert_allclose(after[0, prefix:].reshape(*new, 5).numpy(), literal, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_antialiased_resizing_is_timms(old: tuple[int, int], new: tuple[int, int]) -> None:
    before = table(1 + old[0] * old[1])
    theirs = timm.layers.resample_abs_pos_embed(before, new_size=list(new), old_size=list(old), num_prefix_tokens=1)
    torch.testing.assert_close(resize_position_embedding(before, old, new), theirs, rtol=0, atol=1e-6)


def test_the_same_grid_changes_nothing_and_a_turned_one_does() -> None:
    before = table(37)
    assert resize_position_embedding(before, (4, 9), (4, 9)) is before
    turned = resize_position_embedding(before, (4, 9), (9, 4))
    assert turned.shape == before.shape
    assert (turned - before).abs().max() > 0.1


def test_half_precision_stays_and_is_interpolated_in_single() -> None:
    before = table(37).half()
    after = resize_position_embedding(before, (6, 6), (8, 8))
    assert after.dtype == torch.float16
    assert torch.equal(after, resize_position_embedding(before.float(), (6, 6), (8, 8)).half())


def test_gradients_pass_through_resizing() -> None:
    before = table(37).requires_grad_()
    resize_position_embedding(before, (6, 6), (8, 8)).sum().backward()
    assert before.grad is not None
    # Interpolation weights of one new entry sum to 1, so the gradients sum to the number of new entries.
    assert before.grad.sum() == pytest.approx(65 * 5, rel=1e-5)


@pytest.mark.parametrize(("rows", "cols", "dim"), [(14, 14, 32), (3, 7, 8), (1, 5, 4), (37, 37, 16)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_sines_are_the_literal_ones(rows: int, cols: int, dim: int, prefix: int) -> None:
    ours = sincos_position_embedding((rows, cols), dim, num_prefix_tokens=prefix)
    assert ours.shape == (1, prefix + rows * cols, dim)
    assert not ours[:, :prefix].any()
    np.testing.assert_allclose(ours[0, prefix:].numpy(), reference.sincos_2d(rows, cols, dim), atol=1e-6)


def test_two_tables_side_by_side() -> None:
    """A patch has its column's entry in the first half and its row's in the second."""
    position = LearnedPosition2d((3, 4), 6, num_prefix_tokens=2)
    whole = position((3, 4))
    assert whole.shape == (1, 14, 6)
    assert torch.equal(whole[:, :2], position.prefix)
    for row in range(3):
        for col in range(4):
            expected = torch.cat([position.col[0, col], position.row[0, row]])
            assert torch.equal(whole[0, 2 + row * 4 + col], expected)


def test_two_tables_for_another_grid() -> None:
    position = LearnedPosition2d((3, 4), 6, num_prefix_tokens=1)
    enlarged = position((5, 8)).detach()
    assert enlarged.shape == (1, 41, 6)
    row = np.stack(
        [np.interp((np.arange(5) + 0.5) * 3 / 5 - 0.5, np.arange(3), channel) for channel in position.row[0].detach().numpy().T]
    )
    np.testing.assert_allclose(enlarged[0, 1:].reshape(5, 8, 6)[:, 3, 3:].numpy(), row.T, atol=1e-6)
    position.resize((5, 8))
    assert position.grid == (5, 8)
    assert torch.equal(position((5, 8)), enlarged)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(InputError, match=r"1 prefix tokens and 6 x 6 patches has shape \(1, 37, dim\), got \(1, 36, 5\)"):
        resize_position_embedding(table(36), (6, 6), (7, 7))
    with pytest.raises(InputError, match=r"got \(37, 5\)"):
        resize_position_embedding(table(37)[0], (6, 6), (7, 7))
    with pytest.raises(
        InputError, match="resampling must be one of bicubic-antialias, bicubic, bicubic-align-corners; got 'linear'"
    ):
        resize_position_embedding(table(37), (6, 6), (7, 7), resampling="linear")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"at least one row and one column, got \(0, 7\)"):
        resize_position_embedding(table(37), (6, 6), (0, 7))
    with pytest.raises(InputError, match="width divisible by 4, got 6"):
        sincos_position_embedding((2, 2), 6)
