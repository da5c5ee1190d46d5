"""Which tokens are patches, where they lie, and how large a patch is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.errors import InputError

__all__ = ["TokenGrid", "find_token_grid"]


@dataclass(frozen=True)
class TokenGrid:
    """Where a model's tokens lie on its input: prefix tokens first, then the patches row by row.

    Args:
        rows: Patches from top to bottom.
        cols: Patches from left to right.
        patch_size: Height and width of a patch in pixels of the model's input.
        num_prefix_tokens: Tokens before the patches (class token, distillation token, registers).
        has_cls_token: Whether the first of them is a class token.
    """

    rows: int
    cols: int
    patch_size: tuple[int, int]
    num_prefix_tokens: int
    has_cls_token: bool

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or min(self.patch_size) < 1 or self.num_prefix_tokens < 0:
            raise InputError(f"a token grid needs positive rows, columns and patch sizes and no negative prefix, got {self}")
        if self.has_cls_token and self.num_prefix_tokens == 0:
            raise InputError(f"a class token is a prefix token, but {self} counts none")

    @property
    def num_patches(self) -> int:
        return self.rows * self.cols

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches

    def check_tokens(self, tokens: int) -> None:
        """Raise InputError unless attention over `tokens` tokens fits this grid."""
        if tokens != self.num_tokens:
            raise InputError(
                f"attention covers {tokens} tokens, but {self} accounts for {self.num_tokens}; "
                "pass the grid of the images that the model saw (attention within windows is not supported)"
            )

    def centres(self) -> Float[Tensor, "patch 2"]:
        """Patch centres (y, x) in pixels, row by row, in float64."""
        height, width = self.patch_size
        y = (torch.arange(self.rows, dtype=torch.float64) + 0.5) * height
        x = (torch.arange(self.cols, dtype=torch.float64) + 0.5) * width
        return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)

    def distances(
        self, start: int = 0, stop: int | None = None, *, device: torch.device | None = None
    ) -> Float[Tensor, "query patch"]:
        """Euclidean distance in pixels from the patches `start` to `stop` to every patch, in float32."""
        query = torch.arange(*slice(start, stop).indices(self.num_patches), device=device)
        return _windows(self, device)[self.rows - 1 - query // self.cols, self.cols - 1 - query % self.cols].flatten(1)

    def uniform_distance(self) -> float:
        """Mean attention distance, in pixels, of a head that attends to all patches alike."""
        height, width = self.patch_size
        down = torch.arange(self.rows, dtype=torch.float64)
        right = torch.arange(self.cols, dtype=torch.float64)
        # A pair of rows `n` apart occurs rows times (n = 0) or 2 * (rows - n) times among rows * rows pairs.
        row_pairs = torch.where(down == 0, self.rows, 2 * (self.rows - down))
        col_pairs = torch.where(right == 0, self.cols, 2 * (self.cols - right))
        length = torch.hypot((down * height)[:, None], (right * width)[None, :])
        return float((row_pairs[:, None] * col_pairs[None, :] * length).sum() / self.num_patches**2)


@lru_cache(maxsize=4)
def _windows(grid: TokenGrid, device: torch.device | None) -> Float[Tensor, "row col key_row key_col"]:
    """Distances from each patch, last patch first: all of them windows of one small table of offsets."""
    down = torch.arange(1 - grid.rows, grid.rows, dtype=torch.float64) * grid.patch_size[0]
    right = torch.arange(1 - grid.cols, grid.cols, dtype=torch.float64) * grid.patch_size[1]
    offsets = torch.hypot(down[:, None], right[None, :]).float().to(device)
    return offsets.unfold(0, grid.rows, 1).unfold(1, grid.cols, 1)


def find_token_grid(model: nn.Module, height: int, width: int) -> TokenGrid:
    """The grid of the tokens that `model` makes of an image of `height` x `width` pixels.

    A model that has a method `token_grid(height, width)` answers for itself (as `VisionTransformer` does). Otherwise the
    patch size is read from the timm or transformers configuration, or from the first convolution whose stride equals its
    kernel; prefix tokens are counted from the same configuration, or from the model's token parameters.

    Raises:
        InputError: If the model does not tell how large its patches are, or shuffles them.
    """
    if getattr(getattr(model, "config", None), "mask_ratio", None) is not None:
        raise InputError(f"{type(model).__name__} drops and shuffles patches at random, so that none has a place of its own")
    own: Callable[[int, int], TokenGrid] | None = getattr(model, "token_grid", None)
    if own is not None:
        return own(height, width)
    patch_height, patch_width = _patch_size(model)
    prefix, has_cls = _prefix_tokens(model)
    return TokenGrid(height // patch_height, width // patch_width, (patch_height, patch_width), prefix, has_cls)


def _patch_size(model: nn.Module) -> tuple[int, int]:
    embedding = getattr(model, "patch_embed", None)
    named = getattr(embedding, "patch_size", None)
    if embedding is not None and hasattr(embedding, "feat_ratio"):  # timm: pixels a token, a hybrid's stem included
        named = embedding.feat_ratio(as_scalar=False)
    if named is None:
        named = getattr(getattr(model, "config", None), "patch_size", None)  # transformers
    if isinstance(named, int):
        return named, named
    if named is not None and len(named) == 2:
        return int(named[0]), int(named[1])
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride and max(module.stride) > 1:
            return int(module.stride[0]), int(module.stride[1])
    raise InputError(
        f"cannot tell the patch size of {type(model).__name__}: it has no patch_embed.patch_size, no config.patch_size and no "
        "convolution whose stride equals its kernel; pass grid=TokenGrid(...)"
    )


def _prefix_tokens(model: nn.Module) -> tuple[int, bool]:
    parameters = {name.rpartition(".")[2]: value for name, value in model.named_parameters()}
    has_cls = any(name in parameters for name in ("cls_token", "class_token", "class_embedding"))
    count = getattr(model, "num_prefix_tokens", None)  # timm
    if count is None:
        others = [parameters[name] for name in _OTHER_PREFIX_TOKENS if name in parameters]
        count = int(has_cls) + sum(value.shape[-2] for value in others)
    return int(count), has_cls


_OTHER_PREFIX_TOKENS = ("dist_token", "distillation_token", "reg_token", "register_tokens")
