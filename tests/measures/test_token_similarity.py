"""Token similarity: closed forms, types and images without pairs."""

from __future__ import annotations

import pytest
import torch

from tests.measures.tiles import of_tokens
from vit_probe import InputError, token_similarity


def test_tokens_that_are_all_the_same_or_opposite() -> None:
    tokens = torch.ones(1, 6, 4)
    assert of_tokens(token_similarity, tokens, 2, 3) == pytest.approx(1)
    tokens[:, :3] = -2
    assert of_tokens(token_similarity, tokens, 2, 3) == pytest.approx((6 - 9) / 15)
    assert of_tokens(token_similarity, torch.eye(6)[None], 2, 3) == pytest.approx(0)


def test_tokens_of_zeros_have_no_direction() -> None:
    tokens = torch.ones(1, 4, 3)
    tokens[0, 0] = 0
    assert of_tokens(token_similarity, tokens, 2, 2) == pytest.approx(6 / 12)
    assert of_tokens(token_similarity, torch.zeros(1, 4, 3), 2, 2) == 0


def test_half_precision_does_not_overflow() -> None:
    tokens = torch.full((1, 4, 300), 6e4, dtype=torch.float16)
    assert of_tokens(token_similarity, tokens, 2, 2) == pytest.approx(1)


def test_scale_and_order_of_tokens_change_nothing() -> None:
    tokens = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = of_tokens(token_similarity, tokens, 2, 3)
    scaled = tokens.flip(1) * torch.tensor([1e-3, 1, 7, 1e4, 2, 0.5])[:, None]
    assert of_tokens(token_similarity, scaled, 2, 3) == pytest.approx(expected, rel=1e-12)


def test_an_image_of_one_patch_has_no_pairs() -> None:
    with pytest.raises(InputError, match="an image of one patch have no pairs to compare; use images of several patches"):
        of_tokens(token_similarity, torch.ones(1, 1, 4), 1, 1)
