"""`locate_tokens`: find a model's attention layers and where their tokens lie on the image, by probing the model itself."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vit_probe.attention.hooks import check_attention_captured
from vit_probe.attention.intercept import evaluation_mode
from vit_probe.errors import InputError
from vit_probe.tokens.grid import TokenGrid, Windows, has_class_token, read_patch_size
from vit_probe.tokens.identity_attention import IdentityAttentionProbe, TokenPositions

__all__ = ["TokenLayout", "locate_tokens"]

# How far from its patch a change may peak, in the median over patches and relative to the grid's side. A stem spreads a change
# over a few patches around its own; in a mirrored, rotated or shuffled order, most peaks are more than a third of a side away.
_NEAR = 0.25
_MIN_SIDE = 4  # patches; on smaller grids, a few patches are most of the side


@dataclass(frozen=True)
class TokenLayout:
    """The self-attention layers of a model and where their tokens lie, for images of one size.

    Attributes:
        grid: Where the tokens lie, in all layers that `windows` does not list.
        layers: Module path of each self-attention layer, in the order in which they run.
        skipped: Module paths of attention that is not self-attention, with the reason.
        windows: Where the tokens lie in layers whose attention is not over all the tokens of `grid`: attention within windows,
            or after patches were merged. By layer number.
        seq_first: Module paths of whatever puts the tokens before the images (`batch_first=False`).

    Examples:
        >>> from vit_probe import VisionTransformer, ViTConfig
        >>> model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
        >>> layout = locate_tokens(model, 32, 48)
        >>> layout.grid.rows, layout.grid.cols
        (4, 6)
        >>> layout.grid_of(1) == layout.grid
        True
    """

    grid: TokenGrid
    layers: list[str]
    skipped: dict[str, str]
    windows: dict[int, Windows]
    seq_first: frozenset[str]

    def grid_of(self, layer: int) -> TokenGrid:
        """Return the grid of a layer: that of its windows if it has any, else the model's."""
        windows = self.windows.get(layer)
        return windows.grid if windows else self.grid


def locate_tokens(model: nn.Module, height: int, width: int, *, grid: TokenGrid | None = None) -> TokenLayout:
    """Find the self-attention layers of `model`, and where their tokens lie on images of `height` x `width` pixels.

    Only the patch size is read from the model. Everything else is found by running the model on coded images while each token
    attends to itself alone. Nothing passes between tokens then, so each query shows what is in its own patch. In each image,
    the patches that are noise instead of blank encode one bit of their row or column numbers; together, the queries spell out
    where their tokens lie. Prefix tokens and padding do not change with the image. This finds windows in any library, shifted
    and strided ones included, and patches that were merged between layers.

    About ten images pass through the first layer (through all layers, if there are windows) and three through the whole model:
    later layers over all tokens are checked with a single random code (except in our own models, whose order is known). The
    model is left as it was.

    If a convolutional stem mixes neighbouring patches, codes cannot be read exactly. Then the numbers of patches and prefix
    tokens are checked, and that a change to one patch has its largest effect on a token near it.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        grid: Where the patches lie, for a model whose patch size cannot be read from it. It is checked like any other.

    Returns:
        The layers, the grid of the tokens and, where attention is within windows or after patches were merged, the windows.

    Raises:
        InputError: If the patch size cannot be read from the model, the number or the order of the tokens does not fit the
            grid, the tokens of windows cannot be placed, the model does not take images of this size, or the attention of some
            layers is not captured.

    Examples:
        >>> from vit_probe import VisionTransformer, ViTConfig
        >>> model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
        >>> layout = locate_tokens(model, height=32, width=32)
        >>> layout.grid
        TokenGrid(rows=4, cols=4, patch_size=(8, 8), num_prefix_tokens=1, has_cls_token=True)
        >>> layout.layers
        ['blocks.0.attn', 'blocks.1.attn']
        >>> layout.windows  # all layers attend over the whole grid
        {}

        Any module will do. The patch size of this one is read from its convolution:

        >>> from torch import nn
        >>> class Encoder(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patches = nn.Conv2d(3, 16, kernel_size=(8, 4), stride=(8, 4))
        ...         self.layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True)
        ...
        ...     def forward(self, images):
        ...         return self.layer(self.patches(images).flatten(2).transpose(1, 2))
        >>> locate_tokens(Encoder(), height=32, width=32).grid
        TokenGrid(rows=4, cols=8, patch_size=(8, 4), num_prefix_tokens=0, has_cls_token=False)
    """
    own_grid = getattr(model, "token_grid", None)
    is_own = callable(own_grid)
    if grid is None and callable(own_grid):
        grid = own_grid(height, width)  # raises for sizes that do not divide into patches
    patch_size = grid.patch_size if grid else read_patch_size(model)
    with evaluation_mode(model):
        probe = IdentityAttentionProbe(model, height, width)
        _probe_blank(probe, model, height, width)
        first_shape = probe.blank_codes[0].shape
        # Another number of tokens or windows than in the first layer, or several windows: to be decoded layer by layer.
        windowed = [n for n, codes in probe.blank_codes.items() if len(codes) > 1 or codes.shape != first_shape]
        probe.probe_noise(max(windowed, default=0) if is_own else len(probe.layers) - 1)
        grid = _find_grid(model, (height, width), patch_size, probe, grid)
        decoded = sorted({0, *windowed})
        merges = {layer: _count_merges(probe, layer, grid) for layer in decoded}
        positions = probe.decode_positions(patch_size, merges)
        windows = {}
        for layer in decoded:
            if probe.noise_codes[layer].shape[:2] == (1, grid.num_tokens):
                _check_order(probe, layer, grid, positions[layer])
            else:
                windows[layer] = _windows(probe, layer, grid, merges[layer], positions[layer])
        is_mixed = bool(positions[0].mixed[probe.is_patch(0)].any())
        # The random code has patches of the first layer's size, so it cannot be read after a merge.
        unmerged = [layer for layer in probe.noise_codes if not merges.get(layer)]
        later = [layer for layer in unmerged if layer not in decoded]
        _check_random_code(probe, grid, unmerged, later=later, exact=not is_mixed)
        if not probe.separates_images(last=max(windows, default=0)):
            raise InputError(
                f"{type(model).__name__} mixes the windows or heads of different images: it does not order them image by "
                "image, so they cannot be told apart"
            )
    return TokenLayout(grid, probe.layers, probe.skipped, windows, frozenset(probe.seq_first))


def _probe_blank(probe: IdentityAttentionProbe, model: nn.Module, height: int, width: int) -> None:
    """Make the first pass, which shows whether the model takes images of this size and whether its attention is captured."""
    try:
        probe.probe_blank()
    except (InputError, torch.OutOfMemoryError):
        raise
    except (AssertionError, RuntimeError, ValueError) as error:  # what libraries raise for images of the wrong size
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{type(model).__name__} cannot take images of {height} x {width} pixels ({reason}); pass images of the size that "
            "it was made for"
        ) from error
    check_attention_captured(model, probe)


def _find_grid(
    model: nn.Module, size: tuple[int, int], patch_size: tuple[int, int], probe: IdentityAttentionProbe, given: TokenGrid | None
) -> TokenGrid:
    """Return the given grid, or that which follows from the patch size, if the first layer has as many patches."""
    patches = int(probe.is_patch(0).sum())
    # Windows may hold padding, but a layer over all tokens has exactly the patches and the prefix.
    over_all_tokens = (
        codes.shape[1]
        for layer, codes in probe.noise_codes.items()
        if len(codes) == 1 and int(probe.is_patch(layer).sum()) == patches
    )
    tokens = next(over_all_tokens, patches)
    if given is not None:
        rows, cols = (length // patch for length, patch in zip(size, patch_size, strict=True))
        # Overlapping patches may be one fewer per side; a grid that is off by more belongs to images of another size.
        if max(abs(rows - given.rows), abs(cols - given.cols)) > 1:
            raise InputError(
                f"images of {size[0]} x {size[1]} pixels make {rows} x {cols} patches, which {given} does not fit; pass the "
                "grid of these images"
            )
        if tokens != given.num_tokens or patches < given.num_patches:
            raise InputError(
                f"{type(model).__name__} makes {tokens} tokens of images of {size[0]} x {size[1]} pixels, {patches} of which "
                f"depend on the image, but {given} accounts for {given.num_tokens}; pass the grid of these images"
            )
        return given
    # Pixels at the edge that do not fill a patch may be left out, or padded.
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


def _check_order(probe: IdentityAttentionProbe, layer: int, grid: TokenGrid, positions: TokenPositions) -> None:
    """Raise InputError unless the prefix tokens come first and then the patches row by row."""
    first = grid.num_prefix_tokens
    is_patch, index = probe.is_patch(layer)[0, first:], positions.index[:, 0, first:]
    if positions.mixed[0, first:].any():
        in_order = bool(is_patch.all()) and _changes_peak_nearby(probe, grid)
    else:
        in_order = bool(is_patch.all()) and torch.equal(index, _row_by_row(grid))
    if not in_order:
        first_four = zip(*index[:, :4].tolist(), is_patch[:4].tolist(), strict=True)
        listed = ", ".join(f"({row}, {col})" if patch else "none" for row, col, patch in first_four)
        raise InputError(_order_message(probe, layer, grid) + f"; after the prefix come the patches {listed}, ...")


def _changes_peak_nearby(probe: IdentityAttentionProbe, grid: TokenGrid) -> bool:
    """Return whether a change to one patch is largest in a token near it, in the median over some patches."""
    if min(grid.rows, grid.cols) < _MIN_SIDE:
        return True
    shifts = []
    # Most of these patches are away from the middle and the diagonals, where a mirrored or transposed order changes little.
    for row, col in itertools.product((0.1, 0.3, 0.6), (0.2, 0.5, 0.9)):
        place = torch.tensor([int(row * grid.rows), int(col * grid.cols)])
        is_noise = torch.ones(grid.rows, grid.cols, dtype=torch.bool)
        is_noise[tuple(place)] = False
        change = probe.codes(probe.pixels_of(is_noise, grid), last=0)[0] - probe.noise_codes[0]
        peak = int(change.norm(dim=-1)[0, grid.num_prefix_tokens :].argmax())
        shifts.append((_row_by_row(grid)[:, peak] - place).double() / torch.tensor([grid.rows, grid.cols]))
    return bool(torch.stack(shifts).abs().amax(dim=1).median() <= _NEAR)


def _check_random_code(
    probe: IdentityAttentionProbe, grid: TokenGrid, layers: list[int], *, later: list[int], exact: bool
) -> None:
    """Raise InputError unless in all `layers` keys belong to their queries, and in the `later` ones tokens are in order.

    One image is shown, in which a random half of the patches is noise. If the stem mixes patches (not `exact`), the check is
    only that the patches of the `later` layers depend on the image.
    """
    first = grid.num_prefix_tokens
    is_noise = torch.rand(grid.rows, grid.cols, generator=torch.Generator().manual_seed(0)) < 0.5
    codes = probe.codes(probe.pixels_of(is_noise, grid), last=max(probe.noise_codes)) if exact else {}
    for layer in layers:
        if layer in later:
            is_patch = probe.is_patch(layer)[0, first:]
            in_order = not exact or torch.equal(probe.shows_noise(layer, codes[layer])[0, first:], is_noise.flatten())
            if not is_patch.all() or not in_order:
                raise InputError(_order_message(probe, layer, grid))
        # Cross-attention between sequences of the same length looks like self-attention in everything but this.
        if exact and not probe.keys_match_queries(layer, codes[layer]):
            raise InputError(
                f"{_layer_name(probe, layer)} is not self-attention, though it has as many keys as queries: its keys come from "
                "other patches than its queries"
            )


def _order_message(probe: IdentityAttentionProbe, layer: int, grid: TokenGrid) -> str:
    name = _layer_name(probe, layer)
    return f"{name} does not order its tokens as {grid} says, prefix tokens first and then the patches row by row"


def _layer_name(probe: IdentityAttentionProbe, layer: int) -> str:
    return f"layer {layer} ({probe.layers[layer] or 'the model itself'})"


def _row_by_row(grid: TokenGrid) -> Int[Tensor, "2 patch"]:
    """Return the row and column of each patch."""
    number = torch.arange(grid.num_patches)
    return torch.stack([number // grid.cols, number % grid.cols])


def _count_merges(probe: IdentityAttentionProbe, layer: int, grid: TokenGrid) -> int:
    """Return how often patches were merged two by two before a layer, judging by how many patches it has."""
    patches = int(probe.is_patch(layer).sum())
    for merges in range(max(grid.rows, grid.cols).bit_length() + 1):
        if _merged_grid(grid, merges).num_patches == patches:
            return merges
    raise InputError(_not_placed_message(probe, layer))


def _merged_grid(grid: TokenGrid, merges: int) -> TokenGrid:
    factor = 2**merges
    height, width = grid.patch_size
    return TokenGrid(math.ceil(grid.rows / factor), math.ceil(grid.cols / factor), (height * factor, width * factor), 0, False)


def _windows(probe: IdentityAttentionProbe, layer: int, grid: TokenGrid, merges: int, positions: TokenPositions) -> Windows:
    """Return where the tokens lie of a layer that attends within windows, or after patches were merged."""
    merged = _merged_grid(grid, merges)
    row, col = positions.index
    is_patch = probe.is_patch(layer)
    numbers = (row * merged.cols + col).masked_fill(~is_patch, -1)
    if positions.mixed[is_patch].any() or sorted(numbers[is_patch].tolist()) != list(range(merged.num_patches)):
        raise InputError(_not_placed_message(probe, layer))
    return Windows(merged, numbers, probe.masked_pairs.get(layer))


def _not_placed_message(probe: IdentityAttentionProbe, layer: int) -> str:
    windows, tokens = probe.noise_codes[layer].shape[:2]
    groups = f"{windows} windows of {tokens} tokens" if windows > 1 else f"{tokens} tokens"
    return (
        f"{_layer_name(probe, layer)} attends over {groups} whose positions on the image cannot be determined: something other "
        "than attention mixes neighbouring patches before it"
    )
