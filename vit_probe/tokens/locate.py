"""`locate_tokens`: find a model's attention layers and where their tokens lie on the image, by probing the model itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral

import torch
from torch import Tensor, nn

from vit_probe.attention.arguments import check_model
from vit_probe.attention.hooks import check_attention_captured
from vit_probe.attention.intercept import evaluation_mode
from vit_probe.attention.wrappers import full_precision, unwrap
from vit_probe.errors import InputError
from vit_probe.tokens.class_token import find_class_token
from vit_probe.tokens.footprint import CellResponses, distinct_gains, mixing_gains, show_own_cells
from vit_probe.tokens.grid import TokenGrid, Windows, check_grid, first_parameter
from vit_probe.tokens.identity_attention import IdentityAttentionProbe
from vit_probe.tokens.patch_embedding import first_convolution, read_patch_size
from vit_probe.tokens.place_layer import (
    count_merges,
    layer_name,
    not_self_attention_message,
    order_message,
    place_layer,
)
from vit_probe.tokens.unusable_models import explain_failure

__all__ = ["TokenLayout", "locate_tokens"]


@dataclass(frozen=True)
class TokenLayout:
    """The self-attention layers of a model and where their tokens lie, for images of one size.

    Attributes:
        grid: Where the tokens lie, in all layers that `windows` does not list.
        layers: Module path of each self-attention layer, in the order in which they run.
        skipped: Module paths of attention that is not among the layers, with the reason: it is not self-attention, or was not
            seen.
        windows: Where the tokens lie in layers whose attention is not over all the tokens of `grid`: attention within windows,
            or after patches were merged. By layer number.
        seq_first: Module paths of whatever puts the tokens before the images (`batch_first=False`).
        unfused: Module paths of those layers that compute their attention in code of their own, by a softmax.

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
    unfused: list[str] = field(default_factory=list)

    def grid_of(self, layer: int) -> TokenGrid:
        """Return the grid of a layer: that of its windows if it has any, else the model's."""
        windows = self.windows.get(layer)
        return windows.grid if windows else self.grid


def locate_tokens(
    model: nn.Module, height: int, width: int, *, grid: TokenGrid | None = None, channels: int | None = None
) -> TokenLayout:
    """Find the self-attention layers of `model`, and where their tokens lie on images of `height` x `width` pixels.

    Only the patch size is read from the model. Everything else is found by running the model on coded images while each token
    attends to itself alone. Nothing passes between tokens then, so each query shows what is in its own patch. In each image,
    the patches that are noise instead of blank encode one bit of their row or column numbers; together, the queries spell out
    where their tokens lie. Prefix tokens and padding do not change with the image. This finds windows in any library, shifted
    and strided ones included, and patches that were merged between layers.

    About nine images pass through the first layer (through all layers up to the last one with windows). In later layers, each
    token's place is read from three images in which every patch has changed a little, each in a proportion of its own, and
    compared with that of the first image (except in our own models, whose order is known). The model is left as it was.

    Where patches overlap, are cut from a padded image, or are mixed by several convolutions, codes cannot be read exactly. Then
    about fifteen images tell how much of each query and key comes from each patch (see `vit_probe.tokens.footprint`), and each
    token must lie on its own patch. A stem that mixes so many patches evenly that neighbours cannot be told apart is refused.
    On grids of fewer than about eight patches a side, a patch size that is wrong by a pixel cannot be told from the right one
    there.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        grid: Where the patches lie, for a model whose patch size cannot be read from it. It is checked like any other.
        channels: Number of channels of the images; that of the model's first convolution if None.

    Returns:
        The layers, the grid of the tokens and, where attention is within windows or after patches were merged, the windows.

    Raises:
        InputError: If the patch size cannot be read from the model, the number or the order of the tokens does not fit the
            grid, so many patches are mixed that the order cannot be told, the tokens of windows cannot be placed, the model
            does not take images of this size, or the attention of some layers is not captured.

    Examples:
        >>> from vit_probe import VisionTransformer, ViTConfig
        >>> model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
        >>> layout = locate_tokens(model, height=32, width=32)
        >>> layout.grid == TokenGrid(4, 4, (8, 8), num_prefix_tokens=1, has_cls_token=True)
        True
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
        >>> locate_tokens(Encoder(), height=32, width=32).grid == TokenGrid(4, 8, (8, 4), 0, False)
        True
    """
    check_model(model)
    _check_arguments(height, width, grid, channels)
    own_grid = getattr(unwrap(model), "token_grid", None)
    is_own = callable(own_grid)
    if grid is None and callable(own_grid):
        grid = own_grid(height, width)  # raises for sizes that do not divide into patches
    # Under autocast, small changes of an image would be lost.
    without_autocast = torch.autocast(first_parameter(model).device.type, enabled=False)
    with evaluation_mode(model), full_precision(model), without_autocast:
        try:
            probe = IdentityAttentionProbe(model, height, width, channels)
        except (MemoryError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"an image of {height} x {width} pixels does not fit into memory ({reason}); pass the size in pixels of the "
                "images that the model sees"
            ) from error
        _probe_noise(probe, model, (height, width), channels)
        try:
            return _place_tokens(probe, model, (height, width), grid, is_own=is_own)
        except InputError:
            if not probe.repeats():
                raise InputError(
                    f"{type(model).__name__} gives the same image other tokens each time: it drops, shuffles or changes them "
                    "at random, so patches have no fixed positions; pass a model that does not (an encoder without random "
                    "masking)"
                ) from None
            raise


def _check_arguments(height: object, width: object, grid: object, channels: object) -> None:
    """Raise InputError unless the sizes are positive whole numbers, and the grid is one."""
    for name, value in {"height": height, "width": width, "channels": 3 if channels is None else channels}.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be a positive whole number, got {value!r:.80}")
    check_grid(grid)


def _place_tokens(
    probe: IdentityAttentionProbe, model: nn.Module, size: tuple[int, int], grid: TokenGrid | None, *, is_own: bool
) -> TokenLayout:
    """Return the layout of a model that has been shown noise, with the given grid or that which the model tells."""
    patch_size = grid.patch_size if grid else read_patch_size(model)
    num_layers, first_shape = len(probe.layers), probe.noise_codes[0].shape
    # Another number of tokens or windows than in the first layer, or several windows: to be decoded layer by layer.
    windowed = [n for n, codes in probe.noise_codes.items() if len(codes) > 1 or codes.shape != first_shape]
    num_decoded = max(windowed, default=0) + 1
    if probe.is_rounded and not is_own:
        num_decoded = num_layers
    probe.probe_blank(num_decoded - 1)
    _check_finite(probe, probe.blank_codes)
    is_given, grid = grid is not None, _find_grid(model, size, patch_size, probe, grid)
    if not probe.probe_pixels(grid, num_decoded - 1):
        raise InputError(
            f"{type(model).__name__} mixes the windows or heads of different images: it does not order them image by "
            "image, so they cannot be told apart"
        )
    merges = {layer: count_merges(probe, layer, grid) if layer in windowed else 0 for layer in probe.blank_codes}
    positions = probe.decode_positions(patch_size, {n: times for n, times in merges.items() if n not in probe.mixing})
    # A stem that mixes patches does so for all layers; and if the first layer's patches do not mix on this grid, those of later
    # layers were mixed between the layers.
    if 0 in probe.mixing or not positions[0].mixed[probe.responding[0]].any():
        probe.mixing.update(n for n, found in positions.items() if found.mixed[probe.responding[n]].any())
    if _is_shifted(model, patch_size) and positions.get(0) is not None and positions[0].mixed.any():
        probe.mixing.update(merges)
    if is_own:
        # The stem may mix so many patches that their order cannot be told; but it is known.
        known = probe.mixing - set(windowed)
        probe.mixing -= known
        merges = {layer: times for layer, times in merges.items() if layer not in known}
    windows: dict[int, Windows | None] = {}
    for layer in merges.keys() - probe.mixing:
        windows[layer] = place_layer(probe, layer, grid, merges[layer], positions[layer])
    later = range(num_decoded, num_layers) if not is_own else range(0)
    if later and 0 in probe.mixing:
        probe.mixing.update(later)
    elif later:
        _check_later_layers(probe, grid, later, follow=not is_given)
    if probe.mixing:
        gains, last = mixing_gains(grid.rows, grid.cols), max(probe.mixing)
        responses = CellResponses(probe, grid, gains, last, follow=not is_given and last == num_layers - 1)
        for layer in probe.mixing:
            windows[layer] = place_layer(probe, layer, grid, merges.get(layer, 0), responses)
    if not is_given:
        grid = _with_class_token(grid, model, probe)
    some = {layer: found for layer, found in sorted(windows.items()) if found is not None}
    return TokenLayout(grid, probe.layers, probe.skipped, some, frozenset(probe.seq_first), probe.unfused)


def _is_shifted(model: nn.Module, patch_size: tuple[int, int]) -> bool:
    """Return whether patches of this size are cut from a padded image, so that they lie beside the cells of the grid."""
    _, convolution = first_convolution(unwrap(model))
    return convolution is not None and convolution.stride == patch_size and convolution.padding not in ((0, 0), "valid")


def _check_later_layers(probe: IdentityAttentionProbe, grid: TokenGrid, layers: range, *, follow: bool) -> None:
    """Raise InputError unless the tokens of `layers` are in order; note those in which tokens mix patches in `probe.mixing`."""
    responses = CellResponses(probe, grid, distinct_gains(grid.rows, grid.cols), layers[-1], follow=follow)
    for layer in layers:
        own = show_own_cells(responses, layer, grid.patch_tokens)
        if own is None:
            probe.mixing.add(layer)
        elif not (own[0].all() and probe.responding[layer][0, grid.patch_tokens].all()):
            raise InputError(order_message(probe, layer, grid))
        elif not own[1].all():
            raise InputError(not_self_attention_message(probe, layer))


def _with_class_token(grid: TokenGrid, model: nn.Module, probe: IdentityAttentionProbe) -> TokenGrid:
    """Return the grid with what can be told of its class token."""
    if grid.num_tokens == grid.num_patches:
        return replace(grid, has_cls_token=False)
    whole = next(n for n, codes in probe.noise_codes.items() if codes.shape[:2] == (1, grid.num_tokens))
    has_class_token, place = find_class_token(model, probe, whole, grid.patch_tokens)
    return replace(grid, has_cls_token=has_class_token, class_token=place)


def _probe_noise(probe: IdentityAttentionProbe, model: nn.Module, size: tuple[int, int], channels: int | None) -> None:
    """Make the first pass, which shows whether the model takes images of this size and whether its attention is captured."""
    try:
        probe.probe_noise()
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # models raise all kinds of errors for what they do not expect
        raise explain_failure(model, size, channels, error) from error
    check_attention_captured(model, probe)
    _check_finite(probe, probe.noise_codes)


def _check_finite(probe: IdentityAttentionProbe, codes: Mapping[int, Tensor]) -> None:
    """Raise InputError if the queries or keys of a layer are NaN or infinite."""
    for layer, of_layer in codes.items():
        if not of_layer.isfinite().all():
            raise InputError(
                f"the queries or keys of {layer_name(probe, layer)} are not finite: the model's weights hold NaN or infinity, "
                "or its numbers overflow; a float16 model can be converted with .float() or .bfloat16()"
            )


def _find_grid(
    model: nn.Module, size: tuple[int, int], patch_size: tuple[int, int], probe: IdentityAttentionProbe, given: TokenGrid | None
) -> TokenGrid:
    """Return the given grid, or that which follows from the patch size, if the first layer has as many patches.

    What is found tells nothing of the class token.
    """
    patches = int(probe.responding[0].sum())
    # Windows may hold padding, but a layer over all tokens has exactly the patches, the prefix and the suffix.
    over_all_tokens = (
        layer for layer, is_patch in probe.responding.items() if len(is_patch) == 1 and int(is_patch.sum()) == patches
    )
    whole = next(over_all_tokens, None)
    tokens = patches if whole is None else probe.noise_codes[whole].shape[1]
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
            if whole is None or tokens == patches:
                return TokenGrid(rows, cols, patch_size, 0, None)
            suffix = tokens - 1 - int(probe.responding[whole][0].nonzero().max())
            return TokenGrid(rows, cols, patch_size, tokens - patches - suffix, None, num_suffix_tokens=suffix)
    rows, cols = (length // patch for length, patch in zip(size, patch_size, strict=True))
    raise InputError(
        f"images of {size[0]} x {size[1]} pixels make {rows} x {cols} patches of {patch_size[0]} x {patch_size[1]}, but "
        f"{patches} of the {tokens} tokens of {type(model).__name__} depend on the image; pass grid=TokenGrid(...)"
    )
