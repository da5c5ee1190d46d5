"""Which tokens are patches, where they lie, and how large a patch is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vit_probe.errors import InputError

__all__ = [
    "TokenGrid",
    "Windows",
    "first_convolution",
    "first_parameter",
    "first_tensor",
    "has_class_token",
    "input_channels",
    "read_patch_size",
]


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
                "pass the grid of the images that the model saw (and, for attention within windows, its windows)"
            )

    def centres(self) -> Float[Tensor, "patch 2"]:
        """Patch centres (y, x) in pixels, row by row, in float64."""
        height, width = self.patch_size
        y = (torch.arange(self.rows, dtype=torch.float64) + 0.5) * height
        x = (torch.arange(self.cols, dtype=torch.float64) + 0.5) * width
        return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)

    def distances(
        self, start: int = 0, stop: int | None = None, *, device: torch.device | None = None, out: Tensor | None = None
    ) -> Float[Tensor, "query patch"]:
        """Euclidean distance in pixels from the patches `start` to `stop` to every patch, in float32; written to `out`."""
        start, stop, _ = slice(start, stop).indices(self.num_patches)
        table = _row_distances(self, device)
        distances = torch.empty(stop - start, self.num_patches, device=device) if out is None else out
        for row in range(start // self.cols, -(-stop // self.cols)):
            first, last = max(start, row * self.cols), min(stop, (row + 1) * self.cols)
            columns = table[first - row * self.cols : last - row * self.cols]
            distances[first - start : last - start] = columns.narrow(1, (self.rows - 1 - row) * self.cols, self.num_patches)
        return distances

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
def _row_distances(grid: TokenGrid, device: torch.device | None) -> Float[Tensor, "col offset"]:
    """Distances from a patch in each column to patches from `rows - 1` rows above to as many below, row by row.

    Those of a patch to the patches of the grid lie side by side in it, so that no table of all pairs is needed.
    """
    down = torch.arange(1 - grid.rows, grid.rows, dtype=torch.float64) * grid.patch_size[0]
    right = torch.arange(1 - grid.cols, grid.cols, dtype=torch.float64) * grid.patch_size[1]
    offsets = torch.hypot(down[:, None], right[None, :]).float()
    return offsets.unfold(1, grid.cols, 1).flip(1).transpose(0, 1).reshape(grid.cols, -1).to(device)


_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Windows:
    """Where the tokens of a layer lie that attends within windows, or over coarser patches than the model's first layer.

    Args:
        grid: The patches of this layer, without prefix tokens.
        patches: Which patch each token of each window is, counted row by row; -1 for a token that is none (padding).
        masked_pairs: Which tokens a mask hides from each other; None where there is no mask. (A shifted window that reaches over the
            image's edge holds patches of opposite sides, which must not see each other.)
    """

    grid: TokenGrid
    patches: Int[Tensor, "window token"]
    masked_pairs: Bool[Tensor, "window query key"] | None = None

    @property
    def is_patch(self) -> Bool[Tensor, "window token"]:
        """Which tokens are patches."""
        return self.patches >= 0

    def distances(
        self, windows: Int[Tensor, "window"] | slice = _ALL, queries: slice = _ALL
    ) -> Float[Tensor, "window query key"]:
        """Distance in pixels from some tokens of some windows to all their tokens, in float32; 0 to what is no patch."""
        if self._whole:
            return self.grid.distances(queries.start, queries.stop)[None].expand(len(self.patches[windows]), -1, -1)
        return self._distances[windows][:, queries]

    def uniform_distance(self) -> float:
        """Mean attention distance, in pixels, of a head that attends alike to all patches that it may see."""
        if self._whole:
            return self.grid.uniform_distance()
        total = 0.0
        for index, (patches, is_patch) in enumerate(zip(self.patches, self.is_patch, strict=True)):
            seen = is_patch.expand(len(patches), -1)
            if self.masked_pairs is not None:
                seen = seen & ~self.masked_pairs[index]
            of_query = (self._between(patches) * seen).sum(dim=-1) / seen.sum(dim=-1).clamp_min(1)
            total += float(of_query[is_patch].sum())
        return total / self.grid.num_patches

    @cached_property
    def _whole(self) -> bool:
        """Whether there is but one window, of all patches row by row."""
        return self.masked_pairs is None and torch.equal(self.patches, torch.arange(self.grid.num_patches)[None])

    @cached_property
    def _distances(self) -> Float[Tensor, "window query key"]:
        return torch.stack([self._between(patches).float() for patches in self.patches]) * self.is_patch[:, None, :]

    def _between(self, patches: Int[Tensor, "token"]) -> Float[Tensor, "query key"]:
        centres = self.grid.centres()[patches.clamp_min(0)]
        return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def read_patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch in pixels, from the timm or transformers configuration, else from the first convolution
    if its stride equals its kernel.

    Raises:
        InputError: If the model does not tell, or drops patches at random.
    """
    if getattr(getattr(model, "config", None), "mask_ratio", None) is not None:
        raise InputError(f"{type(model).__name__} drops and shuffles patches at random, so that none has a place of its own")
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
    _, first = first_convolution(model)
    if first is not None and first.kernel_size == first.stride and max(first.stride) > 1:
        return int(first.stride[0]), int(first.stride[1])
    raise InputError(
        f"cannot tell the patch size of {type(model).__name__}: it has no patch_embed.patch_size and no config.patch_size, and "
        "its first convolution is not one whose stride equals its kernel; pass grid=TokenGrid(...)"
    )


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d | None]:
    """The convolution that sees the image, and its path; None if there is no convolution."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return next(found, ("", None))


def input_channels(model: nn.Module) -> int:
    """The colour channels of the images that the model takes; 3 if it has no convolution to tell."""
    _, first = first_convolution(model)
    return 3 if first is None else first.in_channels


def first_parameter(model: nn.Module) -> Tensor:
    """A parameter whose device and floating-point type are taken for the model's; an empty tensor if there is none."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, dtype=torch.float32))


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor of numbers that are not whole in what a module is given or returns, one or several; None if none is."""
    if not isinstance(values, list | tuple):
        values = (values,)
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)


def has_class_token(model: nn.Module) -> bool:
    """Whether one of the model's parameters has a class token's name."""
    return any(_CLASS_TOKEN.search(name) for name, _ in model.named_parameters())


_CLASS_TOKEN = re.compile(r"(^|[._])(cls|class)(_?tok(en)?s?|_?embed(ding)?)?$")
