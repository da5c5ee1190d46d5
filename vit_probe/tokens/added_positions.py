"""What a model adds to its patch tokens for their positions, whatever it computes it from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vit_probe.attention.calls import AttentionCall
from vit_probe.attention.intercept import AttentionInterceptor, ForwardStopped, evaluation_mode, intercept_attention
from vit_probe.attention.wrappers import full_precision, unwrap
from vit_probe.errors import InputError
from vit_probe.tokens.grid import first_parameter, first_tensor
from vit_probe.tokens.patch_embedding import input_channels, read_patch_size

__all__ = ["added_positions"]

_SMALLEST = 3e-4  # relative to the tokens: smaller changes are not taken for positions
_CHUNK = 1024  # tokens that are compared with all others at once


def added_positions(model: nn.Module, height: int, width: int) -> tuple[Float[Tensor, "patch dim"], int, int] | None:
    """What is added to each patch token before the first attention layer, with the rows and columns of patches.

    The model is shown a blank and a noisy image. The patches' tokens are followed from module to module, from the convolution
    or linear layer that makes them to the first attention layer, by how they differ between the two images. Where the tokens of
    both images change by the same amount, something was added that does not depend on the image. If it is not the same for all
    patches, it is their positions: entries of a table, however stored, or numbers that are computed on the way. This finds the
    order of the patches, too.

    If the numbers are successive rows of one of the model's tensors, these rows are returned, free of the rounding of the sum.

    Args:
        model: Any Vision Transformer. It runs in evaluation mode and without gradients.
        height: Height of the images in pixels.
        width: Width of the images in pixels.

    Returns:
        In float64 on the CPU, row by row; None if nothing is added, or the model does not take such images.

    Examples:
        >>> from vit_probe import VisionTransformer, ViTConfig
        >>> model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
        >>> added, rows, cols = added_positions(model, 32, 32)
        >>> torch.equal(added, model.pos_embed[0, 1:].double())
        True
    """
    model = unwrap(model)
    try:
        patch_size = read_patch_size(model)
        follower = _TokenFollower((height // patch_size[0], width // patch_size[1]))
    except InputError:  # overlapping patches; the first convolutions tell their number
        follower = _TokenFollower(None)
    images = torch.randn(2, input_channels(model), height, width, generator=torch.Generator().manual_seed(0))
    images[0] = 0
    # Libraries raise all kinds of errors for images that they do not take.
    with (
        suppress(ForwardStopped, Exception),
        evaluation_mode(model),
        full_precision(model),
        intercept_attention(model, follower),
    ):
        model(images.to(first_parameter(model)))
    if follower.added is None:
        return None
    rows, cols = follower.grid
    stored = _stored_rows(model, follower.added, follower.rounding)
    return follower.added if stored is None else stored, rows, cols


class _TokenFollower(AttentionInterceptor):
    """Follows the patch tokens of two images from module to module, and sums up what is added to those of both alike.

    Attributes:
        grid: Rows and columns of the patches.
        added: What was added, row by row; None if nothing was, or the same to all patches.
        rounding: By how much the sum of tokens and positions may be rounded.
    """

    def __init__(self, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.grid = grid or (0, 0)
        self.added: Float[Tensor, "patch dim"] | None = None
        self.rounding = 0.0
        self._tokens = torch.empty(2, 0, 0)

    def before_forward(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().before_forward(name, module, args, kwargs)
        self._follow(None, first_tensor((*args, *kwargs.values())))

    def after_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        super().after_forward(name, module, args, kwargs, output)
        self._follow(module, first_tensor(output))

    def handle_self_attention(self, call: AttentionCall) -> Tensor:
        raise ForwardStopped

    def _follow(self, module: nn.Module | None, tensor: Tensor | None) -> None:
        """Take a module's input, or the output of `module`."""
        if tensor is None or tensor.ndim < 3:
            return
        precision = torch.finfo(tensor.dtype).eps
        tensor = tensor.detach().cpu().double()
        for tokens in _arrangements(tensor):
            order = _order(self._tokens, tokens, precision**0.5)
            if order is not None:
                self._add(tokens[:, order], precision)
                return
        if self.added is not None and tensor.shape[-1] == self._tokens.shape[-1] and _depends_on_image(tensor):
            raise ForwardStopped  # a norm or a branch: whatever comes now is no longer the tokens
        if self.added is None:
            self._restart(module, tensor)

    def _add(self, tokens: Float[Tensor, "2 patch dim"], precision: float) -> None:
        step = (tokens - self._tokens)[0]
        self.rounding = max(self.rounding, 4 * precision * float(tokens[0].abs().max()))
        self._tokens = tokens
        total = step if self.added is None else self.added + step
        # A norm of tokens that are normalised already changes them a little, too, by its epsilon.
        smallest = max(self.rounding, _SMALLEST * float(tokens[0].abs().max()))
        if self.added is not None or (step - step.mean(dim=0)).abs().max() > smallest:
            self.added = total

    def _restart(self, module: nn.Module | None, tensor: Tensor) -> None:
        """Follow the tokens that a convolution, a linear layer, a norm or the like has made of others."""
        rows, cols = self.grid
        if tensor.shape[0] != 2 or not _depends_on_image(tensor):
            return
        if hasattr(module, "kernel_size") and tensor.ndim == 4:
            self.grid = rows, cols = tensor.shape[2], tensor.shape[3]
        if tensor.ndim == 4 and tensor.shape[2:] == (rows, cols):
            self._tokens = tensor.flatten(2).mT.clone()
        elif tensor.shape[1:-1].numel() == rows * cols:
            self._tokens = tensor.flatten(1, -2).clone()


def _arrangements(tensor: Float[Tensor, "..."]) -> Iterator[Float[Tensor, "2 token dim"]]:
    """The ways to read a tensor as the tokens of two images: images first or second, channels last or second."""
    if len(tensor) % 2 == 0:
        yield tensor.reshape(2, -1, tensor.shape[-1])
        if tensor.ndim == 4 and len(tensor) == 2:
            yield tensor.flatten(2).mT
    if tensor.ndim == 3 and tensor.shape[1] == 2:
        yield tensor.transpose(0, 1)


def _order(
    known: Float[Tensor, "2 patch dim"], tokens: Float[Tensor, "2 token dim"], tolerance: float
) -> Int[Tensor, "patch"] | None:
    """Which token is which of the known patches, by how it differs between the images; None if some patch is not there."""
    if not known.numel() or known.shape[-1] != tokens.shape[-1]:
        return None
    wanted, change = known[1] - known[0], tokens[1] - tokens[0]
    size = float(wanted.square().mean().sqrt())
    # Other tokens do not change, so that the sums of squares are the same, or these are not the tokens.
    if abs(float(change.square().sum()) / float(wanted.square().sum()) - 1) > tolerance:
        return None
    nearest = (change - wanted[0]).square().sum(dim=1).argmin()
    in_order = torch.arange(len(wanted)) + nearest
    orders = [in_order] if in_order[-1] < len(change) else []
    for order in itertools.chain(orders, _nearest_tokens(wanted, change)):  # all pairs only where tokens are not in order
        if float((change[order] - wanted).abs().max()) <= 8 * tolerance * size:
            return order
    return None


def _nearest_tokens(patches: Float[Tensor, "patch dim"], tokens: Float[Tensor, "token dim"]) -> Iterator[Int[Tensor, "patch"]]:
    """The most similar token of each patch."""
    projection = torch.randn(patches.shape[-1], 8, generator=torch.Generator().manual_seed(0), dtype=patches.dtype)
    codes = tokens @ projection
    yield torch.cat([torch.cdist(part @ projection, codes).argmin(dim=1) for part in patches.split(_CHUNK)])


def _depends_on_image(tensor: Tensor) -> bool:
    return len(tensor) % 2 == 0 and not torch.equal(*tensor.chunk(2))


def _stored_rows(model: nn.Module, added: Float[Tensor, "patch dim"], rounding: float) -> Float[Tensor, "patch dim"] | None:
    """Successive rows of one of the model's tensors that are the numbers that were added; None if there are none."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_floating_point() or tensor.shape[-1:] != added.shape[-1:] or tensor.numel() < added.numel():
            continue
        rows = tensor.detach().cpu().double().reshape(-1, tensor.shape[-1])
        starts = ((rows[: len(rows) - len(added) + 1] - added[0]).abs().amax(dim=1) <= rounding).nonzero().flatten().tolist()
        for start in starts:
            found = rows[start : start + len(added)]
            if float((found - added).abs().max()) <= rounding:
                return found
    return None
