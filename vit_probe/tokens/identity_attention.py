"""A model in which every token attends to itself alone, so that each query shows which pixels its token stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vit_probe.attention.intercept import AttentionCall, AttentionInterceptor, ForwardStopped, intercept_attention
from vit_probe.tokens.grid import TokenGrid, first_parameter, first_tensor, input_channels

__all__ = ["IdentityAttentionProbe", "TokenPositions"]

_QUERY, _KEY = slice(0, 4), slice(4, 8)  # the parts of a code
_CHANGED = 1e-3  # relative to a query's mean size, well above float32's rounding: a query that changes by more is a patch's
_MIXED = 1e-2  # relative to the change from blank to noise: a query that is farther from both shows a mixture of patches


@dataclass
class TokenPositions:
    """The row and the column of the patch that each token of a layer shows.

    Args:
        index: The row and the column.
        mixed: Which tokens show a mixture of patches, so that their row and column are only the closest match.
    """

    index: Int[Tensor, "2 window token"]
    mixed: Bool[Tensor, "window token"]

    @classmethod
    def zeros(cls, shape: torch.Size) -> TokenPositions:
        """Row 0 and column 0 for every token, none of them mixed."""
        return cls(torch.zeros(2, *shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool))


class IdentityAttentionProbe(AttentionInterceptor):
    """Runs a model on images of blank and noisy pixels while in every attention layer each token attends to itself alone.

    Nothing then passes from token to token, so a token's query in any layer depends on the pixels of its own patch alone (and
    on those that the stem mixes in). A patch is either blank or shows its part of one fixed noise image. Once the queries for
    both are known, a query tells which of them its patch shows: one bit per patch and forward pass. Blank is zeros, the mean
    colour in most preprocessing. Noise changes the query of every patch, whatever the weights.

    The *code* of a token is a few numbers computed from its query, followed by as many computed from its key.

    Args:
        model: In evaluation mode, without gradients.
        height: Height of the images in pixels.
        width: Width of the images in pixels.

    Attributes:
        blank_codes: The tokens' codes for an image that is all blank, by layer.
        noise_codes: The same for an image that is all noise.
        masked_pairs: Which pairs of tokens of a window the mask hides from each other, by layer with windows and a mask.
        seq_first: Module paths of whatever returns tensors with the one image in the second dimension.
    """

    def __init__(self, model: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.blank_codes: dict[int, Float[Tensor, "window token 8"]] = {}
        self.noise_codes: dict[int, Float[Tensor, "window token 8"]] = {}
        self.masked_pairs: dict[int, Bool[Tensor, "window query key"]] = {}
        self.seq_first: set[str] = set()
        self._model = model
        self._codes: dict[int, Tensor] = {}
        shape = (1, input_channels(model), height, width)
        generator = torch.Generator().manual_seed(0)  # the same noise in all passes, or its codes could not be compared
        self._noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(first_parameter(model))

    def probe_blank(self) -> None:
        """Set `blank_codes`, `masked_pairs` and `seq_first`, by one pass through the whole model."""
        handles = [
            module.register_forward_hook(partial(self._note_layout, path)) for path, module in self._model.named_modules()
        ]
        try:
            self.blank_codes = self.codes(torch.zeros(1, *self._noise.shape[2:], dtype=torch.bool))
        finally:
            for handle in handles:
                handle.remove()

    def probe_noise(self, last: int) -> None:
        """Set `noise_codes` up to the layer `last`."""
        self.noise_codes = self.codes(torch.ones(1, *self._noise.shape[2:], dtype=torch.bool), last)

    def codes(
        self, is_noise: Bool[Tensor, "image row col"], last: int | None = None
    ) -> dict[int, Float[Tensor, "window token 8"]]:
        """Return the tokens' codes by layer, up to the layer `last`, for images in which these pixels are noise."""
        self._codes, self.stop_after = {}, last
        with intercept_attention(self._model, self), suppress(ForwardStopped):
            self._model(self._noise * is_noise[:, None].to(self._noise.device))
        return self._codes

    def is_patch(self, layer: int) -> Bool[Tensor, "window token"]:
        """Return which tokens are patches: those whose query depends on the image."""
        size = torch.maximum(_norm(self.blank_codes[layer]), _norm(self.noise_codes[layer])).mean()
        return self._contrast(layer) > _CHANGED * size

    def decode_positions(self, patch_size: tuple[int, int], merges: Mapping[int, int]) -> dict[int, TokenPositions]:
        """Return the row and column of the patch that each token shows.

        One image per bit of the row numbers, and one per bit of the column numbers: in each, those patches are noise whose row
        (or column) number has the bit set.

        Args:
            patch_size: Height and width of the patches of the first layer, in pixels.
            merges: How often patches were merged two by two before a layer, by layer. Only these layers are decoded.
        """
        positions = {layer: TokenPositions.zeros(self.noise_codes[layer].shape[:2]) for layer in merges}
        for axis, (length, patch) in enumerate(zip(self._noise.shape[2:], patch_size, strict=True)):
            number = torch.arange(length) // patch
            for bit in range(int(number[-1]).bit_length()):
                # A merge joins patches that differ in the lowest bit, so each merge leaves one bit less to decode.
                layers = [layer for layer, times in merges.items() if times <= bit]
                if not layers:
                    continue
                stripes = (number >> bit & 1).bool()
                is_noise = (stripes[:, None] if axis == 0 else stripes).expand(1, *self._noise.shape[2:])
                codes = self.codes(is_noise, max(layers))
                for layer in layers:
                    from_blank, from_noise = (
                        _norm(codes[layer] - known[layer]) for known in (self.blank_codes, self.noise_codes)
                    )
                    positions[layer].index[axis] += self.shows_noise(layer, codes[layer]).long() << (bit - merges[layer])
                    positions[layer].mixed |= torch.minimum(from_blank, from_noise) > _MIXED * self._contrast(layer)
        return positions

    def pixels_of(self, patches: Bool[Tensor, "row col"], grid: TokenGrid) -> Bool[Tensor, "1 row col"]:
        """Return which pixels belong to the given patches of `grid`."""
        sides = zip(self._noise.shape[2:], grid.patch_size, patches.shape, strict=True)
        row, col = ((torch.arange(length) // patch).clamp_max(count - 1) for length, patch, count in sides)
        return patches[row][:, col][None]

    def shows_noise(
        self, layer: int, codes: Float[Tensor, "window token 8"], part: slice = _QUERY
    ) -> Bool[Tensor, "window token"]:
        """Return which tokens' queries (or keys) are closer to noise than to blank."""
        return _norm(codes - self.noise_codes[layer], part) < _norm(codes - self.blank_codes[layer], part)

    def keys_match_queries(self, layer: int, codes: Float[Tensor, "window token 8"]) -> bool:
        """Return whether each patch's key shows the same as its query, as in self-attention."""
        match = self.shows_noise(layer, codes, _KEY) == self.shows_noise(layer, codes)
        return bool(match[self.is_patch(layer)].all())

    def separates_images(self, last: int) -> bool:
        """Return whether the windows and heads of a batch are ordered by image: all those of the first image come first."""
        codes = self.codes(torch.tensor([False, True])[:, None, None].expand(2, *self._noise.shape[2:]), last)
        for layer, both in codes.items():
            expected = torch.cat([self.blank_codes[layer], self.noise_codes[layer]])
            if both.shape != expected.shape or bool((_norm(both - expected) > _MIXED * self._contrast(layer).amax()).any()):
                return False
        return True

    def handle_self_attention(self, call: AttentionCall) -> Tensor:
        """Keep the codes, and return the values, as if each token attended to itself alone."""
        self._codes[call.layer] = torch.cat([_code(call.query), _code(call.key)], dim=-1)
        if call.mask is not None and len(call.query) > 1 and not self.blank_codes:
            self.masked_pairs[call.layer] = _masked_pairs(call.mask, call.query.shape)
        values = call.value
        if call.enable_gqa:
            values = values.repeat_interleave(call.query.shape[1] // values.shape[1], dim=1)
        return values.expand(*call.query.shape[:3], -1).contiguous()

    def handle_other_attention(self, query: Tensor, value: Tensor, fused: Callable[[], Tensor]) -> Tensor:
        """Return zeros, so that nothing comes from other sequences."""
        return value.new_zeros(*query.shape[:-1], value.shape[-1])

    def handle_weights(self, intercepted: tuple[Tensor, Any], unfused: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Return the output of identity attention, with the weights that the model asked for."""
        return intercepted[0], unfused[1]

    def _note_layout(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        # With a single image, a tensor of tokens tells which of its dimensions is that of the images.
        tokens = first_tensor(output)
        if tokens is not None and tokens.ndim == 3 and tokens.shape[0] > tokens.shape[1] == 1:
            self.seq_first.add(path)

    def _contrast(self, layer: int) -> Float[Tensor, "window token"]:
        """How much each query changes from blank to noise."""
        return _norm(self.noise_codes[layer] - self.blank_codes[layer])


def _masked_pairs(mask: Tensor, shape: torch.Size) -> Bool[Tensor, "window query key"]:
    """Return which keys a mask hides from each query in every head."""
    # Swin adds -100 instead of -inf, whose exponential is 0 in float32; learned biases stay far from that.
    masked = ~mask if mask.dtype == torch.bool else mask < mask.amax(dim=-1, keepdim=True) - 50
    return masked.expand(*shape[:3], shape[2]).all(dim=1).cpu()


def _code(vectors: Float[Tensor, "window head token dim"]) -> Float[Tensor, "window token 4"]:
    """Reduce each token's vectors in all heads to four numbers, by a fixed random projection."""
    all_heads = vectors.transpose(1, 2).flatten(2).float()
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(all_heads.shape[-1], 4, generator=generator, dtype=torch.float32).to(all_heads.device)
    return (all_heads @ projection).cpu().double()  # MPS has no float64


def _norm(codes: Float[Tensor, "window token 8"], part: slice = _QUERY) -> Float[Tensor, "window token"]:
    return codes[..., part].norm(dim=-1)
