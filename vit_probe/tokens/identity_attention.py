"""A model that passes nothing from token to token, so that each token tells what its own place on the image shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vit_probe.attention.intercept import AttentionCall, AttentionRouter, ForwardStopped, intercepted
from vit_probe.tokens.grid import TokenGrid, first_parameter, first_tensor, input_channels

__all__ = ["IdentityAttentionProbe", "Places"]

_QUERY, _KEY = slice(0, 4), slice(4, 8)
_MOVED = 1e-3  # of a query's size: a query that differs by more depends on the image
_CLEAN = 1e-2  # of the difference between blank and filled: a query that misses both by more shows a mixture


@dataclass
class Places:
    """The row and the column of the patch that each token of a layer shows.

    Args:
        index: The row and the column.
        mixed: Which tokens show a mixture of patches, so that these are the likeliest ones only.
    """

    index: Int[Tensor, "2 window token"]
    mixed: Bool[Tensor, "window token"]

    @classmethod
    def unread(cls, shape: torch.Size) -> Places:
        """All zero as yet."""
        return cls(torch.zeros(2, *shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool))


class IdentityAttentionProbe(AttentionRouter):
    """Shows a model blank and filled pixels while in every attention layer each token attends to itself alone.

    Args:
        model: In evaluation mode, without gradients.
        height: Of the images, in pixels.
        width: Of the images, in pixels.

    Attributes:
        blank: By layer, a few numbers that stand for each token's query, and for its key, when the whole image is blank.
        filled: The same when it is filled with noise.
        masked: By layer with a mask and windows, which tokens of a window the mask hides from each other.
        seq_first: Module paths of whatever returns tensors with the one image in the second place.
    """

    def __init__(self, model: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.blank: dict[int, Float[Tensor, "window token 8"]] = {}
        self.filled: dict[int, Float[Tensor, "window token 8"]] = {}
        self.masked_pairs: dict[int, Bool[Tensor, "window query key"]] = {}
        self.seq_first: set[str] = set()
        self._model = model
        self._seen: dict[int, Tensor] = {}
        shape = (1, input_channels(model), height, width)
        generator = torch.Generator().manual_seed(0)
        self._noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(first_parameter(model))

    def probe_blank(self) -> None:
        """Fills `blank`, `masked` and `seq_first`, from a pass through the whole model."""
        handles = [
            module.register_forward_hook(partial(self._note_layout, path)) for path, module in self._model.named_modules()
        ]
        try:
            self.blank = self.show(torch.zeros(1, *self._noise.shape[2:], dtype=torch.bool))
        finally:
            for handle in handles:
                handle.remove()

    def probe_noise(self, last: int) -> None:
        """Fills `filled` up to the layer `last`."""
        self.filled = self.show(torch.ones(1, *self._noise.shape[2:], dtype=torch.bool), last)

    def show(self, where: Bool[Tensor, "image row col"], last: int | None = None) -> dict[int, Float[Tensor, "window token 8"]]:
        """By layer, up to the layer `last`: what stands for queries and keys when these pixels are filled, the others blank."""
        self._seen, self.stop_after = {}, last
        with intercepted(self._model, self), suppress(ForwardStopped):
            self._model(self._noise * where[:, None].to(self._noise.device))
        return self._seen

    def depends(self, layer: int) -> Bool[Tensor, "window token"]:
        """Which tokens depend on the image: the patches."""
        size = torch.maximum(_size(self.blank[layer]), _size(self.filled[layer])).mean()
        return self._contrast(layer) > _MOVED * size

    def places(self, patch_size: tuple[int, int], merged: Mapping[int, int]) -> dict[int, Places]:
        """Where the patch lies that each token shows, read from one image for each bit of the rows' and columns' numbers.

        Args:
            patch_size: Height and width of the patches of the first layer, in pixels.
            merged: By layer, how often patches were merged two by two before it. Only these layers are read.
        """
        found = {layer: Places.unread(self.filled[layer].shape[:2]) for layer in merged}
        for axis, (length, patch) in enumerate(zip(self._noise.shape[2:], patch_size, strict=True)):
            number = torch.arange(length) // patch
            for bit in range(int(number[-1]).bit_length()):
                reached = [layer for layer, times in merged.items() if times <= bit]
                if not reached:
                    continue
                stripes = (number >> bit & 1).bool()
                where = (stripes[:, None] if axis == 0 else stripes).expand(1, *self._noise.shape[2:])
                seen = self.show(where, max(reached))
                for layer in reached:
                    to_blank, to_filled = (_size(seen[layer] - known[layer]) for known in (self.blank, self.filled))
                    found[layer].index[axis] += self.is_filled(layer, seen[layer]).long() << (bit - merged[layer])
                    found[layer].mixed |= torch.minimum(to_blank, to_filled) > _CLEAN * self._contrast(layer)
        return found

    def patches(self, bits: Bool[Tensor, "row col"], grid: TokenGrid) -> Bool[Tensor, "1 row col"]:
        """The pixels of those patches of `grid` whose bit is set."""
        sides = zip(self._noise.shape[2:], grid.patch_size, bits.shape, strict=True)
        row, col = ((torch.arange(length) // patch).clamp_max(count - 1) for length, patch, count in sides)
        return bits[row][:, col][None]

    def is_filled(
        self, layer: int, seen: Float[Tensor, "window token 8"], part: slice = _QUERY
    ) -> Bool[Tensor, "window token"]:
        """Which tokens' queries (or keys) show noise rather than blank."""
        return _size(seen - self.filled[layer], part) < _size(seen - self.blank[layer], part)

    def keys_agree(self, layer: int, seen: Float[Tensor, "window token 8"]) -> bool:
        """Whether each patch's key shows what its query shows, as in self-attention."""
        agree = self.is_filled(layer, seen, _KEY) == self.is_filled(layer, seen)
        return bool(agree[self.depends(layer)].all())

    def keeps_images_apart(self, last: int) -> bool:
        """Whether the windows and heads of a batch come image by image, all those of the first image first."""
        both = self.show(torch.tensor([False, True])[:, None, None].expand(2, *self._noise.shape[2:]), last)
        for layer, seen in both.items():
            alone = torch.cat([self.blank[layer], self.filled[layer]])
            if seen.shape != alone.shape or bool((_size(seen - alone) > _CLEAN * self._contrast(layer).amax()).any()):
                return False
        return True

    def attend(self, call: AttentionCall) -> Tensor:
        """Notes the queries, and answers with the values, as if each token attended to itself alone."""
        self._seen[call.layer] = torch.cat([_signature(call.query), _signature(call.key)], dim=-1)
        if call.mask is not None and len(call.query) > 1 and not self.blank:
            self.masked_pairs[call.layer] = _masked_pairs(call.mask, call.query.shape)
        values = call.value
        if call.enable_gqa:
            values = values.repeat_interleave(call.query.shape[1] // values.shape[1], dim=1)
        return values.expand(*call.query.shape[:3], -1).contiguous()

    def pass_by(self, query: Tensor, value: Tensor, fused: Callable[[], Tensor]) -> Tensor:
        """Answers with zeros, so that nothing comes from other sequences."""
        return value.new_zeros(*query.shape[:-1], value.shape[-1])

    def pass_weights(self, seen: tuple[Tensor, Any], unfused: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Of the output that passes nothing on, with the weights."""
        return seen[0], unfused[1]

    def _note_layout(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        tokens = first_tensor(output)
        if tokens is not None and tokens.ndim == 3 and tokens.shape[0] > tokens.shape[1] == 1:
            self.seq_first.add(path)

    def _contrast(self, layer: int) -> Float[Tensor, "window token"]:
        return _size(self.filled[layer] - self.blank[layer])


def _masked_pairs(mask: Tensor, shape: torch.Size) -> Bool[Tensor, "window query key"]:
    """Which keys a mask hides from each query in every head. Additive ones of -100, which leave nothing in float32, count."""
    masked = ~mask if mask.dtype == torch.bool else mask < mask.amax(dim=-1, keepdim=True) - 50
    return masked.expand(*shape[:3], shape[2]).all(dim=1).cpu()


def _signature(vectors: Float[Tensor, "window head token dim"]) -> Float[Tensor, "window token 4"]:
    """A few numbers that stand for each token's vectors in all heads."""
    together = vectors.transpose(1, 2).flatten(2).float()
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(together.shape[-1], 4, generator=generator, dtype=torch.float32).to(together.device)
    return (together @ random).cpu().double()  # MPS knows no float64


def _size(vectors: Float[Tensor, "window token 8"], part: slice = _QUERY) -> Float[Tensor, "window token"]:
    return vectors[..., part].norm(dim=-1)
