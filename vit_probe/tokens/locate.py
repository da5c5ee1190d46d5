"""Where a model's tokens lie, found by asking the model itself."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vit_probe.attention.hooks import check_attention_captured
from vit_probe.attention.intercept import evaluated
from vit_probe.errors import InputError
from vit_probe.tokens.grid import TokenGrid, Windows, has_class_token, read_patch_size
from vit_probe.tokens.identity_attention import IdentityAttentionProbe, Places

__all__ = ["TokenLayout", "find_token_grid", "locate_tokens"]

_FEW = 4  # patches a side, below which a stem that mixes neighbours leaves nothing to tell
_NEAR = 0.25  # of the grid's side


@dataclass(frozen=True)
class TokenLayout:
    """The attention layers of a model, for images of one size.

    Args:
        grid: Where the tokens lie.
        layers: Module path of each self-attention layer.
        skipped: Module paths of attention that is not self-attention, with the reason.
        windows: The layers whose attention is not over all the tokens of `grid`.
        seq_first: Module paths of whatever puts the tokens before the images (`batch_first=False`).
    """

    grid: TokenGrid
    layers: list[str]
    skipped: dict[str, str]
    windows: dict[int, Windows]
    seq_first: frozenset[str]

    def grid_of(self, layer: int) -> TokenGrid:
        """Where the tokens of a layer lie, as its windows tell where it has any."""
        windows = self.windows.get(layer)
        return windows.grid if windows else self.grid


def find_token_grid(model: nn.Module, height: int, width: int) -> TokenGrid:
    """The grid of the tokens that `model` makes of an image of `height` x `width` pixels, checked as `survey` does."""
    return locate_tokens(model, height, width).grid


def locate_tokens(model: nn.Module, height: int, width: int, *, grid: TokenGrid | None = None) -> TokenLayout:
    """Finds the self-attention layers of `model`, and where their tokens lie on images of `height` x `width` pixels.

    Only the patch size is read from the model. The rest is found by showing it coded images while each token attends to itself
    alone: nothing then passes from token to token, so that each query tells what its own patch shows, and with one bit of the
    patches' rows or columns in each image the queries spell where they lie. Prefix tokens and padding do not change with
    the image. So windows are found in any library, shifted or strided ones too, and patches that were merged on the way. About
    ten images pass through the first layer (through all, where there are windows), three through the whole model: in later
    layers one random code is read (our own models are trusted there).

    Where a stem or a convolution mixes neighbouring patches, so that a code reads as a mixture, the number of patches and of
    the prefix tokens before them is checked, and that a change to one patch is greatest in a token near it.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        grid: Where the patches lie, for a model that does not tell its patch size; checked alike.

    Raises:
        InputError: If the model does not tell its patch size, makes another number of patches or orders them otherwise, has
            windows whose tokens cannot be placed, does not take images of this size, or no self-attention is seen.
    """
    own = getattr(model, "token_grid", None)
    if grid is None and callable(own):
        grid = own(height, width)  # our own model refuses sizes that do not divide into patches
    patch_size = grid.patch_size if grid else read_patch_size(model)
    with evaluated(model):
        probe = IdentityAttentionProbe(model, height, width)
        _look(probe, model, height, width)
        first = probe.blank[0].shape
        others = [layer for layer, tokens in probe.blank.items() if len(tokens) > 1 or tokens.shape != first]
        probe.probe_noise(max(others, default=0) if callable(own) else len(probe.layers) - 1)
        grid = _find_grid(model, (height, width), patch_size, probe, grid)
        decoded = sorted({0, *others})
        merged = {layer: _times_merged(probe, layer, grid) for layer in decoded}
        places = probe.places(patch_size, merged)
        windows = {}
        for layer in decoded:
            if probe.filled[layer].shape[:2] == (1, grid.num_tokens):
                _check_order(probe, layer, grid, places[layer])
            else:
                windows[layer] = _windows(probe, layer, grid, merged[layer], places[layer])
        mixed = bool(places[0].mixed[probe.depends(0)].any())
        plain = [layer for layer in probe.filled if not merged.get(layer)]
        _check_code(probe, grid, plain, later=[layer for layer in plain if layer not in decoded], exact=not mixed)
        if not probe.keeps_images_apart(last=max(windows, default=0)):
            raise InputError(
                f"{type(model).__name__} mixes the windows or heads of different images, which cannot be told apart"
            )
    return TokenLayout(grid, probe.layers, probe.skipped, windows, frozenset(probe.seq_first))


def _look(probe: IdentityAttentionProbe, model: nn.Module, height: int, width: int) -> None:
    """The first pass, in which it turns out whether the model takes such images and shows its attention."""
    try:
        probe.probe_blank()
    except (InputError, torch.OutOfMemoryError):
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{type(model).__name__} cannot take images of {height} x {width} pixels ({reason}); pass images of the size that "
            "it is made for"
        ) from error
    check_attention_captured(model, probe)


def _find_grid(
    model: nn.Module, size: tuple[int, int], patch_size: tuple[int, int], probe: IdentityAttentionProbe, given: TokenGrid | None
) -> TokenGrid:
    """The grid that was given or follows from the patch size, if it has as many patches as the first layer."""
    patches = int(probe.depends(0).sum())
    whole = next(
        (tokens for layer, tokens in probe.filled.items() if len(tokens) == 1 and int(probe.depends(layer).sum()) == patches),
        None,
    )
    tokens = patches if whole is None else whole.shape[1]
    if given is not None:
        rows, cols = (length // patch for length, patch in zip(size, patch_size, strict=True))
        # Overlapping patches may be one fewer a side; a grid that is off by more belongs to other images.
        if max(abs(rows - given.rows), abs(cols - given.cols)) > 1:
            raise InputError(f"images of {size[0]} x {size[1]} pixels make {rows} x {cols} patches, which {given} does not fit")
        if tokens != given.num_tokens or patches < given.num_patches:
            raise InputError(
                f"{type(model).__name__} makes {tokens} tokens of images of {size[0]} x {size[1]} pixels, {patches} of which "
                f"depend on the image, but {given} accounts for {given.num_tokens}; pass the grid of these images"
            )
        return given
    # Patches at the edge may be left out, or padded.
    sides = [{length // patch, math.ceil(length / patch)} for length, patch in zip(size, patch_size, strict=True)]
    for rows, cols in itertools.product(*sides):
        if rows * cols == patches:
            prefix = tokens - patches
            return TokenGrid(rows, cols, patch_size, prefix, prefix > 0 and has_class_token(model))
    rows, cols = (length // patch for length, patch in zip(size, patch_size, strict=True))
    raise InputError(
        f"images of {size[0]} x {size[1]} pixels make {rows} x {cols} patches of {patch_size[0]} x {patch_size[1]}, but "
        f"{patches} of the {tokens} tokens of {type(model).__name__} depend on the image; pass grid=TokenGrid(...)"
    )


def _check_order(probe: IdentityAttentionProbe, layer: int, grid: TokenGrid, places: Places) -> None:
    """Raise InputError unless the prefix tokens come first and then the patches row by row."""
    first = grid.num_prefix_tokens
    is_patch, found = probe.depends(layer)[0, first:], places.index[:, 0, first:]
    if places.mixed[0, first:].any():
        in_order = bool(is_patch.all()) and _changes_nearby(probe, grid)
    else:
        in_order = bool(is_patch.all()) and torch.equal(found, _row_by_row(grid))
    if not in_order:
        first_four = zip(*found[:, :4].tolist(), is_patch[:4].tolist(), strict=True)
        listed = ", ".join(f"({row}, {col})" if patch else "none" for row, col, patch in first_four)
        raise InputError(_disordered(probe, layer, grid) + f"; after the prefix come the patches {listed}, ...")


def _changes_nearby(probe: IdentityAttentionProbe, grid: TokenGrid) -> bool:
    """Whether a change to one patch is greatest in a token near it, for most of some patches off the grid's diagonals."""
    if min(grid.rows, grid.cols) < _FEW:
        return True  # too few to tell near from far
    away = []
    for row, col in itertools.product((0.1, 0.3, 0.6), (0.2, 0.5, 0.9)):
        place = torch.tensor([int(row * grid.rows), int(col * grid.cols)])
        bits = torch.ones(grid.rows, grid.cols, dtype=torch.bool)
        bits[tuple(place)] = False
        moved = probe.show(probe.patches(bits, grid), last=0)[0] - probe.filled[0]
        peak = int(moved.norm(dim=-1)[0, grid.num_prefix_tokens :].argmax())
        away.append((_row_by_row(grid)[:, peak] - place).double() / torch.tensor([grid.rows, grid.cols]))
    return bool(torch.stack(away).abs().amax(dim=1).median() <= _NEAR)


def _check_code(probe: IdentityAttentionProbe, grid: TokenGrid, layers: list[int], *, later: list[int], exact: bool) -> None:
    """Raise InputError unless these layers have each key where its query is, and the `later` of them, too, the prefix tokens
    first and then the patches row by row. Where a stem mixes patches, only that these depend on the image is checked.
    """
    first = grid.num_prefix_tokens
    bits = torch.rand(grid.rows, grid.cols, generator=torch.Generator().manual_seed(0)) < 0.5
    seen = probe.show(probe.patches(bits, grid), last=max(probe.filled)) if exact else {}
    for layer in layers:
        if layer in later:
            is_patch = probe.depends(layer)[0, first:]
            in_order = not exact or torch.equal(probe.is_filled(layer, seen[layer])[0, first:], bits.flatten())
            if not is_patch.all() or not in_order:
                raise InputError(_disordered(probe, layer, grid))
        if exact and not probe.keys_agree(layer, seen[layer]):
            raise InputError(
                f"layer {layer} ({probe.layers[layer] or 'the model itself'}) is no self-attention, though it has as many keys "
                "as queries: its keys do not show what its queries show"
            )


def _disordered(probe: IdentityAttentionProbe, layer: int, grid: TokenGrid) -> str:
    return (
        f"layer {layer} ({probe.layers[layer] or 'the model itself'}) does not have its tokens as {grid} says, prefix tokens "
        "first and then the patches row by row"
    )


def _row_by_row(grid: TokenGrid) -> Int[Tensor, "2 patch"]:
    """Row and column of each patch."""
    number = torch.arange(grid.num_patches)
    return torch.stack([number // grid.cols, number % grid.cols])


def _times_merged(probe: IdentityAttentionProbe, layer: int, grid: TokenGrid) -> int:
    """How often patches were merged two by two before a layer, so that as many are left as it has tokens for."""
    patches = int(probe.depends(layer).sum())
    for times in range(max(grid.rows, grid.cols).bit_length() + 1):
        coarse = _merged_grid(grid, times)
        if coarse.num_patches == patches:
            return times
    raise InputError(_not_placed(probe, layer))


def _merged_grid(grid: TokenGrid, times: int) -> TokenGrid:
    merged = 2**times
    height, width = grid.patch_size
    return TokenGrid(math.ceil(grid.rows / merged), math.ceil(grid.cols / merged), (height * merged, width * merged), 0, False)


def _windows(probe: IdentityAttentionProbe, layer: int, grid: TokenGrid, merged: int, places: Places) -> Windows:
    """Where the tokens of a layer lie that attends within windows, or after patches were merged."""
    coarse = _merged_grid(grid, merged)
    row, col = places.index
    is_patch = probe.depends(layer)
    numbers = (row * coarse.cols + col).masked_fill(~is_patch, -1)
    if places.mixed[is_patch].any() or sorted(numbers[is_patch].tolist()) != list(range(coarse.num_patches)):
        raise InputError(_not_placed(probe, layer))
    return Windows(coarse, numbers, probe.masked_pairs.get(layer))


def _not_placed(probe: IdentityAttentionProbe, layer: int) -> str:
    windows, tokens = probe.filled[layer].shape[:2]
    groups = f"{windows} windows of {tokens} tokens" if windows > 1 else f"{tokens} tokens"
    return (
        f"layer {layer} ({probe.layers[layer] or 'the model itself'}) attends over {groups} whose places on the image cannot "
        "be told: neighbouring patches are mixed before it by something other than attention"
    )
