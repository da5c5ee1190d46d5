"""Where the tokens of one layer lie, judging by what a probe has seen: in order, or in windows."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from vit_probe.errors import InputError
from vit_probe.tokens.footprint import CellResponses, agrees_with_grid, find_places
from vit_probe.tokens.grid import TokenGrid, Windows
from vit_probe.tokens.identity_attention import IdentityAttentionProbe, TokenPositions

__all__ = ["count_merges", "layer_name", "not_self_attention_message", "order_message", "place_layer"]


def place_layer(
    probe: IdentityAttentionProbe, layer: int, grid: TokenGrid, merges: int, evidence: TokenPositions | CellResponses
) -> Windows | None:
    """Return where the tokens of a layer lie; None if it attends over all tokens, in order.

    Args:
        probe: The model.
        layer: Number of the layer.
        grid: Of the first layer.
        merges: How often patches were merged before the layer.
        evidence: `TokenPositions` of a layer whose tokens show one patch each, else `CellResponses`.
    """
    windows = None
    if probe.noise_codes[layer].shape[:2] == (1, grid.num_tokens):
        _check_order(probe, layer, grid, evidence)
    else:
        windows = _windows(probe, layer, grid, merges, evidence)
    if isinstance(evidence, TokenPositions) and evidence.keys_differ[probe.responding[layer]].any():
        raise InputError(not_self_attention_message(probe, layer))
    return windows


def _check_order(probe: IdentityAttentionProbe, layer: int, grid: TokenGrid, evidence: TokenPositions | CellResponses) -> None:
    """Raise InputError unless the prefix tokens come first and then the patches row by row, and then the suffix tokens."""
    tokens = grid.patch_tokens
    is_patch = probe.responding[layer][0, tokens]
    if isinstance(evidence, CellResponses):
        if not (is_patch.all() and agrees_with_grid(evidence, layer, tokens)):
            raise InputError(
                f"{order_message(probe, layer, grid)}, or what precedes it mixes too many patches to tell; "
                "if another patch size is right, pass grid=TokenGrid(...)"
            )
        return
    index, mixed = evidence.index[:, 0, tokens], evidence.mixed[0, tokens]
    if mixed.any():
        raise InputError(
            f"{order_message(probe, layer, grid)}: {int(mixed.sum())} of its tokens show parts of several such patches; if "
            "another patch size is right, pass grid=TokenGrid(...)"
        )
    if not is_patch.all() or not torch.equal(index, _row_by_row(grid)):
        first_four = zip(*index[:, :4].tolist(), is_patch[:4].tolist(), strict=True)
        listed = ", ".join(f"({row}, {col})" if patch else "none" for row, col, patch in first_four)
        raise InputError(order_message(probe, layer, grid) + f"; after the prefix come the patches {listed}, ...")


def order_message(probe: IdentityAttentionProbe, layer: int, grid: TokenGrid) -> str:
    """Return what to say of a layer whose tokens are in another order."""
    name = layer_name(probe, layer)
    return f"{name} does not order its tokens as {grid} says, prefix tokens first and then the patches row by row"


def not_self_attention_message(probe: IdentityAttentionProbe, layer: int) -> str:
    """Return what to say of a layer whose keys come from elsewhere."""
    # Cross-attention between sequences of the same length looks like self-attention in everything but this.
    return (
        f"{layer_name(probe, layer)} is not self-attention, though it has as many keys as queries: its keys come from other "
        "patches than its queries"
    )


def layer_name(probe: IdentityAttentionProbe, layer: int) -> str:
    """Return what messages call a layer."""
    return f"layer {layer} ({probe.layers[layer] or 'the model itself'})"


def _row_by_row(grid: TokenGrid) -> Int[Tensor, "2 patch"]:
    """Return the row and column of each patch."""
    number = torch.arange(grid.num_patches)
    return torch.stack([number // grid.cols, number % grid.cols])


def count_merges(probe: IdentityAttentionProbe, layer: int, grid: TokenGrid) -> int:
    """Return how often patches were merged two by two before a layer, judging by how many patches it has."""
    patches = int(probe.responding[layer].sum())
    for merges in range(max(grid.rows, grid.cols).bit_length() + 1):
        if _merged_grid(grid, merges).num_patches == patches:
            return merges
    raise InputError(_not_placed_message(probe, layer))


def _merged_grid(grid: TokenGrid, merges: int) -> TokenGrid:
    factor = 2**merges
    height, width = grid.patch_size
    return TokenGrid(math.ceil(grid.rows / factor), math.ceil(grid.cols / factor), (height * factor, width * factor), 0, False)


def _windows(
    probe: IdentityAttentionProbe, layer: int, grid: TokenGrid, merges: int, evidence: TokenPositions | CellResponses
) -> Windows:
    """Return where the tokens lie of a layer that attends within windows, or after patches were merged."""
    merged = _merged_grid(grid, merges)
    is_patch = probe.responding[layer]
    if isinstance(evidence, CellResponses):
        numbers = find_places(evidence, layer, is_patch, merges)
    else:
        row, col = evidence.index
        numbers = (row * merged.cols + col).masked_fill(~is_patch, -1)
        if evidence.mixed[is_patch].any() or sorted(numbers[is_patch].tolist()) != list(range(merged.num_patches)):
            numbers = None
    if numbers is None:
        raise InputError(_not_placed_message(probe, layer))
    return Windows(merged, numbers, probe.masked_pairs.get(layer))


def _not_placed_message(probe: IdentityAttentionProbe, layer: int) -> str:
    windows, tokens = probe.noise_codes[layer].shape[:2]
    groups = f"{windows} windows of {tokens} tokens" if windows > 1 else f"{tokens} tokens"
    return (
        f"{layer_name(probe, layer)} attends over {groups} whose positions on the image cannot be determined: something other "
        "than attention mixes neighbouring patches before it"
    )
