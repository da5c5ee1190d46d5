"""Where tokens lie on the image: the grid of patches, functions of the offset between them, and windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vit_probe.errors import InputError

__all__ = [
    "OffsetFunction",
    "OffsetTable",
    "TokenGrid",
    "Windows",
    "check_grid",
    "first_parameter",
    "first_tensor",
]


OffsetFunction = Callable[[Tensor, Tensor], Tensor]
"""From the offsets dx and dy from query to key to a number for each of them."""


@dataclass(frozen=True)
class TokenGrid:
    """Where a model's tokens lie on its input: prefix tokens first, then the patches row by row, then suffix tokens.

    Args:
        rows: Patches from top to bottom.
        cols: Patches from left to right.
        patch_size: Height and width of a patch in pixels of the model's input.
        num_prefix_tokens: Tokens before the patches (class token, distillation token, registers).
        has_cls_token: Whether there is a class token; None if unknown, which only measures that read it object to.
        class_token: Place of the class token among all tokens; if None and there is one, the first.
        num_suffix_tokens: Tokens behind the patches (detection tokens, prompts).

    Examples:
        >>> grid = TokenGrid(14, 14, (16, 16), num_prefix_tokens=1, has_cls_token=True)
        >>> grid.num_tokens, round(grid.uniform_distance(), 2)
        (197, 116.49)
    """

    rows: int
    cols: int
    patch_size: tuple[int, int]
    num_prefix_tokens: int
    has_cls_token: bool | None
    class_token: int | None = field(default=None, kw_only=True)
    num_suffix_tokens: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        counts = (self.rows, self.cols, self.num_prefix_tokens, self.num_suffix_tokens, self.class_token or 0)
        pair = self.patch_size if isinstance(self.patch_size, tuple | list) else ()
        if len(pair) != 2 or not all(isinstance(one, Integral) and not isinstance(one, bool) for one in (*pair, *counts)):
            raise InputError(
                "a token grid has whole numbers of rows, columns and tokens, and patches of a height and a width, as in "
                f"TokenGrid(14, 14, (16, 16), 1, True); got {self}"
            )
        if self.rows < 1 or self.cols < 1 or min(self.patch_size) < 1:
            raise InputError(f"a token grid needs positive rows, columns and patch sizes, got {self}")
        if self.num_prefix_tokens < 0 or self.num_suffix_tokens < 0:
            raise InputError(f"a token grid has no negative number of prefix or suffix tokens, got {self}")
        if self.class_token is not None:
            object.__setattr__(self, "has_cls_token", True)
        elif self.has_cls_token:
            object.__setattr__(self, "class_token", 0)
        if self.class_token is not None:
            if not 0 <= self.class_token < self.num_tokens:
                raise InputError(f"the class token must be one of {self.num_tokens} tokens, got {self}")
            if self.patch_tokens.start <= self.class_token < self.patch_tokens.stop:
                raise InputError(f"a class token is a prefix or suffix token, but {self} has a patch in its place")

    @property
    def num_patches(self) -> int:
        return self.rows * self.cols

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches + self.num_suffix_tokens

    @property
    def patch_tokens(self) -> slice:
        """Which tokens are patches."""
        return slice(self.num_prefix_tokens, self.num_prefix_tokens + self.num_patches)

    def find_class_token(self) -> int | None:
        """Return the place of the class token; None if there is none.

        Raises:
            InputError: If it is unknown.
        """
        if self.has_cls_token is None:
            raise InputError(
                f"which of the {self.num_prefix_tokens + self.num_suffix_tokens} tokens that are not patches is the class "
                "token cannot be told from the model's output or parameters; pass grid=TokenGrid(..., class_token=...) with "
                "its place, or has_cls_token=False if there is none"
            )
        return self.class_token

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

    def offsets(self) -> tuple[Float[Tensor, "row_offset col_offset"], Float[Tensor, "row_offset col_offset"]]:
        """Offsets (dx, dy) in pixels from a query patch to a key patch, for every offset that occurs on the grid, in float64.

        The middle entry is the offset 0; dx grows to the right and dy downwards.
        """
        height, width = self.patch_size
        dy = torch.arange(1 - self.rows, self.rows, dtype=torch.float64) * height
        dx = torch.arange(1 - self.cols, self.cols, dtype=torch.float64) * width
        dy, dx = torch.meshgrid(dy, dx, indexing="ij")
        return dx, dy

    def uniform_distance(self) -> float:
        """Mean attention distance, in pixels, of a head that attends equally to all patches."""
        return OffsetTable(self, torch.hypot).uniform()


def check_grid(grid: object) -> None:
    """Raise InputError unless `grid` is a `TokenGrid` or None."""
    if grid is not None and not isinstance(grid, TokenGrid):
        raise InputError(f"grid must be a TokenGrid, such as TokenGrid(14, 14, (16, 16), 1, True), or None; got {grid!r:.80}")


class OffsetTable:
    """A function of the offset between two patches, tabulated for a grid.

    The value of a pair of patches depends on their offset alone, so (2 rows - 1) x (2 cols - 1) entries stand for all
    (rows cols)^2 pairs, and no matrix of all pairs is held.

    Args:
        grid: Where the patches lie.
        function: From the offsets dx and dy (float64 tensors) to a value for each of them.
        in_patches: Give the function offsets in units of patches instead of pixels.

    Raises:
        InputError: If the function does not return one finite number per offset.
    """

    def __init__(self, grid: TokenGrid, function: OffsetFunction, *, in_patches: bool = False) -> None:
        self.grid = grid
        dx, dy = grid.offsets()
        if in_patches:
            height, width = grid.patch_size
            dx, dy = dx / width, dy / height
        values = function(dx, dy)
        got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        fits = isinstance(values, Tensor) and values.shape in ((), dx.shape)
        if not fits or not torch.isfinite(values).all():
            raise InputError(
                f"a function of offsets must return one finite number per offset, a tensor of shape {tuple(dx.shape)}; got "
                f"{got}{' with numbers that are not finite' if fits else ''}"
            )
        self.values: Float[Tensor, "row_offset col_offset"] = values.double().expand_as(dx)
        self._by_column: dict[torch.device, Tensor] = {}

    def rows(
        self, start: int = 0, stop: int | None = None, *, device: torch.device | None = None, out: Tensor | None = None
    ) -> Float[Tensor, "query patch"]:
        """Values from the query patches `start` to `stop` to all patches, in float32; written to `out` if given."""
        rows, cols, patches = self.grid.rows, self.grid.cols, self.grid.num_patches
        start, stop, _ = slice(start, stop).indices(patches)
        table = self._columns(torch.device("cpu") if device is None else device)
        values = torch.empty(stop - start, patches, device=device) if out is None else out
        for row in range(start // cols, -(-stop // cols)):
            first, last = max(start, row * cols), min(stop, (row + 1) * cols)
            # In the strip of a column, the values to the patches of the grid lie side by side, from the offset -row on.
            strips = table[first - row * cols : last - row * cols]
            values[first - start : last - start] = strips.narrow(1, (rows - 1 - row) * cols, patches)
        return values

    def pairs(self, queries: Int[Tensor, "query"], keys: Int[Tensor, "key"]) -> Float[Tensor, "query key"]:
        """Values from some patches to some others, both counted row by row, in float64."""
        rows, cols = self.grid.rows, self.grid.cols
        down = keys // cols - (queries // cols)[:, None]
        right = keys % cols - (queries % cols)[:, None]
        return self.values[down + rows - 1, right + cols - 1]

    def uniform(self) -> float:
        """The mean over all pairs of patches: the expectation under uniform attention."""
        rows, cols = self.grid.rows, self.grid.cols
        # An offset of `n` rows occurs `rows - |n|` times.
        down = rows - torch.arange(1 - rows, rows, dtype=torch.float64).abs()
        right = cols - torch.arange(1 - cols, cols, dtype=torch.float64).abs()
        return float((down[:, None] * right * self.values).sum() / self.grid.num_patches**2)

    def _columns(self, device: torch.device) -> Float[Tensor, "col offset"]:
        """For the patches of each column, the values from `rows - 1` rows above to as many below, row by row."""
        if device not in self._by_column:
            strips = self.values.float().unfold(1, self.grid.cols, 1).flip(1).transpose(0, 1)
            self._by_column[device] = strips.reshape(self.grid.cols, -1).to(device)
        return self._by_column[device]


_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Windows:
    """Where the tokens lie of a layer that attends within windows, or over coarser patches than the model's first layer.

    Args:
        grid: The patches of this layer, without prefix tokens.
        patches: Which patch each token of each window is, counted row by row; -1 for a token that is none (padding).
        masked_pairs: Which pairs of tokens a mask hides from each other; None where there is no mask. (A shifted window that
            reaches over the image's edge holds patches of opposite sides, which must not attend to each other.)
    """

    grid: TokenGrid
    patches: Int[Tensor, "window token"]
    masked_pairs: Bool[Tensor, "window query key"] | None = None

    @property
    def is_patch(self) -> Bool[Tensor, "window token"]:
        """Which tokens are patches."""
        return self.patches >= 0

    @cached_property
    def is_whole(self) -> bool:
        """Whether there is a single window, of all patches row by row."""
        return self.masked_pairs is None and torch.equal(self.patches, torch.arange(self.grid.num_patches)[None])

    def pairs(
        self, table: OffsetTable, windows: Int[Tensor, "window"] | slice = _ALL, queries: slice = _ALL
    ) -> Float[Tensor, "window query token"]:
        """Values of `table` from some tokens of some windows to all their tokens, in float32; 0 to what is no patch."""
        if self.is_whole:
            return table.rows(queries.start or 0, queries.stop)[None].expand(len(self.patches[windows]), -1, -1)
        chosen = self.patches[windows]
        values = torch.stack([self._between(table, patches[queries], patches) for patches in chosen]).float()
        return values * (chosen >= 0)[:, None, :]

    def uniform(self, table: OffsetTable) -> float:
        """The mean value of a head that attends equally to all patches that each query may attend to."""
        if self.is_whole:
            return table.uniform()
        total = 0.0
        for index, (patches, is_patch) in enumerate(zip(self.patches, self.is_patch, strict=True)):
            visible = is_patch.expand(len(patches), -1)
            if self.masked_pairs is not None:
                visible = visible & ~self.masked_pairs[index]
            per_query = (self._between(table, patches, patches) * visible).sum(dim=-1) / visible.sum(dim=-1).clamp_min(1)
            total += float(per_query[is_patch].sum())
        return total / self.grid.num_patches

    def _between(
        self, table: OffsetTable, queries: Int[Tensor, "query"], keys: Int[Tensor, "token"]
    ) -> Float[Tensor, "query token"]:
        return table.pairs(queries.clamp_min(0), keys.clamp_min(0))  # padding takes any patch's value; callers zero it


def first_parameter(model: nn.Module) -> Tensor:
    """The first floating-point parameter, whose device and type stand for the model's; an empty tensor if there is none."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, dtype=torch.float32))


def first_tensor(values: Any) -> Tensor | None:
    """The first floating-point tensor among the inputs or outputs of a module; None if there is none."""
    if not isinstance(values, list | tuple):
        values = (values,)
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
