"""A model in which every token attends to itself alone, so that each query shows which pixels its token stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vit_probe.attention.calls import AttentionCall
from vit_probe.attention.data_flow import IMAGE, DataFlow, check_one_after_the_other
from vit_probe.attention.intercept import AttentionInterceptor, ForwardStopped, intercept_attention
from vit_probe.tokens.grid import TokenGrid, first_parameter, first_tensor
from vit_probe.tokens.patch_embedding import input_channels

__all__ = ["IdentityAttentionProbe", "TokenPositions"]

_CODE = 32  # numbers for a query, and as many for a key
_QUERY, _KEY = slice(0, _CODE), slice(_CODE, 2 * _CODE)  # the parts of a code
_CHANGED = 1e-3  # relative to a query's mean size, well above float32's rounding: a query that changes by more is a patch's
_UNCHANGED = 1e-5  # relative to the mean change of all queries: one that changes by less does not depend on the image
_LARGE = 30.0  # what is added to a pixel, so that it counts among all those of its patch
_MIXED = 1e-2  # relative to the change from blank to noise: a query that is farther from both shows a mixture of patches


@dataclass
class TokenPositions:
    """The row and the column of the patch that each token of a layer shows.

    Args:
        index: The row and the column.
        mixed: Which tokens show a mixture of patches, so that their row and column are only the closest match.
        keys_differ: Which tokens have a key that shows another patch than their query.
    """

    index: Int[Tensor, "2 window token"]
    mixed: Bool[Tensor, "window token"]
    keys_differ: Bool[Tensor, "window token"]

    @classmethod
    def zeros(cls, shape: torch.Size) -> TokenPositions:
        """Row 0 and column 0 for every token, none of them mixed."""
        nowhere = torch.zeros(shape, dtype=torch.bool)
        return cls(torch.zeros(2, *shape, dtype=torch.long), nowhere, nowhere)


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
        channels: Number of their channels; that of the model's first convolution if None.

    Attributes:
        noise_codes: The tokens' codes for an image that is all noise, by layer.
        blank_codes: The same for an image that is all blank.
        masked_pairs: Which pairs of tokens of a window the mask hides from each other, by layer with windows and a mask.
        seq_first: Module paths of whatever returns tensors with the one image in the second dimension.
        responding: Which tokens change with the image, by layer; set by `probe_blank` and `small_changes`.
        mixing: Layers in which a token shows pixels of more than one patch.
        influence: How much the pooled output of the model depends on each token of the last layer (the norm of a gradient);
            None if the model returns nothing that is pooled, or that cannot be told. Set by `small_changes`.
    """

    def __init__(self, model: nn.Module, height: int, width: int, channels: int | None = None) -> None:
        super().__init__()
        self.noise_codes: dict[int, Float[Tensor, "window token code"]] = {}
        self.blank_codes: dict[int, Float[Tensor, "window token code"]] = {}
        self.responding: dict[int, Bool[Tensor, "window token"]] = {}
        self.masked_pairs: dict[int, Bool[Tensor, "window query key"]] = {}
        self.seq_first: set[str] = set()
        self.mixing: set[int] = set()
        self.influence: Float[Tensor, "token"] | None = None
        self._has_pooled_output = False
        self._follow_from: int | None = None  # the layer whose influence on the output is being followed
        self._followed: Tensor | None = None  # its output
        self._flow: DataFlow | None = None
        self._origins: dict[int, frozenset[Any]] = {}
        self._model = model
        self._codes: dict[int, Tensor] = {}
        shape = (1, input_channels(model) if channels is None else channels, height, width)
        generator = torch.Generator().manual_seed(0)  # the same noise in all passes, or its codes could not be compared
        self._noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(first_parameter(model))

    @property
    def is_rounded(self) -> bool:
        """Whether the model computes in half precision, in which small changes of an image are lost."""
        return self._noise.dtype.itemsize < torch.float32.itemsize

    def probe_noise(self) -> None:
        """Set `noise_codes`, `masked_pairs` and `seq_first`, by one pass through the whole model.

        Raises:
            InputError: If layers do not run one after the other.
        """
        handles = [
            module.register_forward_hook(partial(self._note_layout, path)) for path, module in self._model.named_modules()
        ]
        try:
            with DataFlow() as self._flow:
                output = self._run(self._flow.mark(self._noise, IMAGE))
            self.noise_codes, self._has_pooled_output = self._codes, bool(_pooled(output))
        finally:
            self._flow = None
            for handle in handles:
                handle.remove()
        check_one_after_the_other(self.layers, self._origins)

    def probe_blank(self, last: int) -> None:
        """Set `blank_codes` and `responding` up to the layer `last`."""
        self.blank_codes = self.codes(torch.zeros(1, *self._noise.shape[2:], dtype=torch.bool), last)
        for layer, blank in self.blank_codes.items():
            size = torch.maximum(_norm(blank), _norm(self.noise_codes[layer])).mean()
            self.responding[layer] = self._contrast(layer) > _CHANGED * size

    def codes(
        self, is_noise: Bool[Tensor, "image row col"], last: int | None = None
    ) -> dict[int, Float[Tensor, "window token code"]]:
        """Return the tokens' codes by layer, up to the layer `last`, for images in which these pixels are noise."""
        self._run(self._noise * is_noise[:, None].to(self._noise.device), last)
        return self._codes

    def codes_of_noise(self, call: Callable[[Tensor], Any], last: int) -> dict[int, Float[Tensor, "window token code"]]:
        """Return the tokens' codes by layer, up to the layer `last`, for the noise and another way to call the model."""
        self._run(self._noise, last, call)
        return self._codes

    def _run(self, images: Tensor, last: int | None = None, call: Callable[[Tensor], Any] | None = None) -> Any:
        """Return the model's output, None if it stops after the layer `last`; set `_codes`."""
        self._codes, self.stop_after = {}, last
        with intercept_attention(self._model, self), suppress(ForwardStopped):
            return (call or self._model)(images)
        return None

    def _run_to_output(self, images: Tensor, last: int) -> None:
        """Set `_codes` and `influence` in one pass, with gradients from the layer `last` on."""
        self._follow_from = last
        try:
            with torch.no_grad():  # restores the mode, which changes where the layer is reached
                pooled = _pooled(self._run(images))
                generator = torch.Generator().manual_seed(0)
                weighted = sum((one * torch.randn(one.shape, generator=generator).to(one)).sum() for one in pooled)
                if isinstance(weighted, Tensor) and weighted.requires_grad and self._followed is not None:
                    (gradient,) = torch.autograd.grad(weighted, self._followed)
                    if len(gradient) == 1:  # no windows
                        self.influence = gradient.cpu().double().square().sum(dim=(0, 1, 3)).sqrt()
        finally:
            self._follow_from, self._followed = None, None

    def repeats(self) -> bool:
        """Return whether the noise shown again gives the same codes."""
        again = self.codes(torch.ones(1, *self._noise.shape[2:], dtype=torch.bool))
        return again.keys() == self.noise_codes.keys() and all(
            again[layer].shape == codes.shape and bool((again[layer] - codes).norm() <= _CHANGED * codes.norm())
            for layer, codes in self.noise_codes.items()
        )

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
                    shows_noise = self._shows_noise(layer, codes[layer])
                    found = positions[layer]
                    found.index[axis] += shows_noise.long() << (bit - merges[layer])
                    found.mixed = found.mixed | (torch.minimum(from_blank, from_noise) > _MIXED * self._contrast(layer))
                    key_differs = self._shows_noise(layer, codes[layer], _KEY) != shows_noise
                    found.keys_differ = found.keys_differ | (key_differs & self._has_key(layer))
        return positions

    def probe_pixels(self, grid: TokenGrid, last: int) -> bool:
        """Set `mixing` up to the layer `last`, and return whether a batch is ordered by image.

        It is if all windows and heads of the first image come before those of the second.

        Where no patch is mixed with others, a pixel belongs to one patch at most, so two pixels change no more than two tokens.
        Of these two, one is the first of its patch and one the last of another: where patches overlap, one is in two of them.
        """
        images, counts = self._noise.repeat(2, 1, 1, 1), (grid.rows, grid.cols)
        pixels: set[tuple[int, ...]] = set()
        for is_last in (False, True):
            # Away from the edges, where there is no neighbour, and from each other, so that they are in different patches.
            patches = [max(min(-(-2 * n // 3) - 1, n - 2), 0) if is_last else min(max(n // 3, 1), n - 1) for n in counts]
            pixels.add(tuple((patch + is_last) * size - is_last for patch, size in zip(patches, grid.patch_size, strict=True)))
        for row, col in pixels:
            images[1, :, row, col] += _LARGE
        self._run(images, last)
        for layer, both in self._codes.items():
            known = self.noise_codes[layer]
            if both.shape != (2 * len(known), *known.shape[1:]):
                return False
            first, second = both.chunk(2)
            if bool((_norm(first - known) > _MIXED * self._contrast(layer).amax()).any()):
                return False
            if int((_norm(second - first) > _CHANGED * _norm(first).mean()).sum()) > len(pixels):
                self.mixing.add(layer)
        return True

    def small_changes(
        self, sizes: Sequence[Float[Tensor, "row col"]], last: int, *, follow: bool = False
    ) -> dict[int, list[Float[Tensor, "window token code"]]]:
        """Return how the codes of the noise change when more noise of these sizes is added to it, by layer up to `last`.

        Args:
            sizes: Of each image, by pixel.
            last: The last layer to see.
            follow: Set `influence`, too.
        """
        if self.is_rounded:
            channels, height, width = self._noise.shape[1:]
            probe = IdentityAttentionProbe(copy.deepcopy(self._model).float(), height, width, channels)
            probe.noise_codes = probe.codes(torch.ones(1, *self._noise.shape[2:], dtype=torch.bool), last)
            probe._has_pooled_output = self._has_pooled_output
            changes = probe.small_changes(sizes, last, follow=follow)
            self.influence, self.responding = probe.influence, probe.responding | self.responding
            return changes
        generator = torch.Generator().manual_seed(1)
        more_noise = torch.randn(self._noise.shape, generator=generator, dtype=torch.float32).to(self._noise)
        follow = follow and self._has_pooled_output
        changes = {layer: [] for layer in self.noise_codes if layer <= last}
        for index, size in enumerate(sizes):
            images = self._noise + more_noise * size.to(more_noise)
            self._codes = {}
            if follow and index == 0:
                with suppress(RuntimeError):  # operations without a gradient
                    self._run_to_output(images, last)
            if not self._codes:
                self._run(images, last)
            for layer in changes:
                changes[layer].append(self._codes[layer] - self.noise_codes[layer])
        for layer, of_layer in changes.items():
            size = torch.stack([_norm(change) for change in of_layer]).amax(dim=0)
            self.responding.setdefault(layer, size > _UNCHANGED * size.mean())
        return changes

    def pixels_of(self, patches: Shaped[Tensor, "row col"], grid: TokenGrid) -> Shaped[Tensor, "row col"]:
        """Return the value that each pixel's patch of `grid` has."""
        sides = zip(self._noise.shape[2:], grid.patch_size, patches.shape, strict=True)
        row, col = ((torch.arange(length) // patch).clamp_max(count - 1) for length, patch, count in sides)
        return patches[row][:, col]

    def _shows_noise(
        self, layer: int, codes: Float[Tensor, "window token code"], part: slice = _QUERY
    ) -> Bool[Tensor, "window token"]:
        """Return which tokens' queries (or keys) are closer to noise than to blank."""
        return _norm(codes - self.noise_codes[layer], part) < _norm(codes - self.blank_codes[layer], part)

    def handle_self_attention(self, call: AttentionCall) -> Tensor:
        """Keep the codes, and return the values, as if each token attended to itself alone."""
        self._codes[call.layer] = torch.cat([_code(vectors) for vectors in call.token_vectors()], dim=-1)
        if call.mask is not None and len(call.query) > 1 and not self.noise_codes:
            self.masked_pairs[call.layer] = _masked_pairs(call.mask, call.query.shape)
        values = call.identity_output()
        if self._flow is not None:
            self._origins[call.layer] = self._flow.origins(*call.inputs)
            return self._flow.mark(values, call.layer)
        if call.layer == self._follow_from:
            torch.set_grad_enabled(True)
            self._followed = values.detach().requires_grad_()
            return self._followed * 1  # models may write to what they get, but not to a leaf of the graph
        return values

    def handle_other_attention(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return zeros, so that nothing comes from other sequences."""
        # Pooling by attention makes the output depend on all tokens alike, or here on none: it tells nothing of any of them.
        self._followed = None
        return torch.zeros_like(compute())

    def handle_weights(self, intercepted: tuple[Tensor, Any], unfused: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Return the output of identity attention, with the weights that the model asked for."""
        return intercepted[0], unfused[1]

    def _note_layout(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        # With a single image, a tensor of tokens tells which of its dimensions is that of the images.
        tokens = first_tensor(output)
        if tokens is not None and tokens.ndim == 3 and tokens.shape[0] > tokens.shape[1] == 1:
            self.seq_first.add(path)

    def _has_key(self, layer: int) -> Bool[Tensor, "window token"]:
        """Return whose keys differ from blank to noise. Where all that is known of a key is a score, a few do not by chance."""
        change = _norm(self.noise_codes[layer] - self.blank_codes[layer], _KEY)
        return change > _CHANGED * change.mean()

    def _contrast(self, layer: int) -> Float[Tensor, "window token"]:
        """How much each query changes from blank to noise."""
        return _norm(self.noise_codes[layer] - self.blank_codes[layer])


def _pooled(output: Any) -> list[Tensor]:
    """Return the tensors in a model's output for one image that hold a single vector."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf for leaf in leaves if leaf.ndim >= 2 and leaf.numel() == leaf.shape[-1]]


def _masked_pairs(mask: Tensor, shape: torch.Size) -> Bool[Tensor, "window query key"]:
    """Return which keys a mask hides from each query in every head."""
    # Swin adds -100 instead of -inf, whose exponential is 0 in float32; learned biases stay far from that.
    masked = ~mask if mask.dtype == torch.bool else mask < mask.amax(dim=-1, keepdim=True) - 50
    return masked.expand(*shape[:3], shape[2]).all(dim=1).cpu()


def _code(vectors: Float[Tensor, "window head token dim"]) -> Float[Tensor, "window token code"]:
    """Reduce each token's vectors in all heads to a few numbers, by a fixed random projection."""
    all_heads = vectors.transpose(1, 2).flatten(2).float()
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(all_heads.shape[-1], _CODE, generator=generator, dtype=torch.float32).to(all_heads.device)
    return (all_heads @ projection).cpu().double()  # MPS has no float64


def _norm(codes: Float[Tensor, "window token code"], part: slice = _QUERY) -> Float[Tensor, "window token"]:
    return codes[..., part].norm(dim=-1)
