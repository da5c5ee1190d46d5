"""Class attention: the patches that the class token attends to, head by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vit_probe.attention.tiles import TILE_BYTES, AttentionInputs, AttentionTile, TiledAttention
from vit_probe.errors import InputError
from vit_probe.measures.base.per_image import PerImageMaps
from vit_probe.measures.base.registry import streaming_measure
from vit_probe.measures.map_statistics import head_correlation, kept_mass_mask, map_correlation
from vit_probe.results import KeyNumber, Result
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid, Windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ClassAttention", "ClassAttentionResult", "class_attention"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ClassAttentionResult(Result):
    """The class token's attention to the patches, one map per image and head of a layer.

    Args:
        maps: (image, head, row, col), softmax weights; the remainder to a sum of 1 is `prefix_mass`.
        images: uint8 (image, height, width, channel), the first 64 images as the model saw them; None if their preprocessing
            is unknown.
        names: Name of each image.
        layer: Which layer, from 0.
        module: Path of its module.
    """

    measure: str = "class_attention"
    maps: Float[np.ndarray, "image head row col"]
    images: UInt8[np.ndarray, "shown height width channel"] | None
    names: Annotated[list[str], "image"]
    layer: int
    module: str

    @property
    def prefix_mass(self) -> np.ndarray:
        """(image, head), the share of attention on prefix tokens: the class token itself and registers."""
        return np.clip(1 - self.maps.sum(axis=(2, 3), dtype=np.float64), 0, 1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per image, head and patch: image, name, head, row, col, attention."""
        image, head, row, col = (index.ravel() for index in np.indices(self.maps.shape))
        name = np.asarray(self.names, dtype=object)[image]
        return pd.DataFrame(
            {"image": image, "name": name, "head": head, "row": row, "col": col, "attention": self.maps.ravel()}
        )

    def summary(self) -> pd.DataFrame:
        """One row per head, means over images: the share of attention on prefix tokens; the smallest fraction of patches that
        holds 60 % of the rest; and the correlation over patches with the other heads (without images in which this head's map
        is constant).
        """
        return pd.DataFrame(
            {
                "head": np.arange(self.maps.shape[1]),
                "prefix mass": self.prefix_mass.mean(axis=0),
                "patches with 60 %": kept_mass_mask(self.maps).mean(axis=(0, 2, 3)),
                "correlation with others": pd.DataFrame(head_correlation(self.maps)).mean().to_numpy(),
            }
        )

    def beside(self, rollout: Float[np.ndarray, "image row col"]) -> pd.DataFrame:
        """One row per image that compares these maps with its rollout: name; heads_correlation, the correlation over patches
        between two heads' maps (mean over pairs of heads, without constant maps); rollout_correlation, the correlation between
        rollout and the mean over heads; heads_patches and rollout_patches, the smallest fraction of patches that holds 60 % of
        a head's map (mean over heads), and of rollout.
        """
        return pd.DataFrame(
            {
                "name": self.names,
                "heads_correlation": pd.DataFrame(head_correlation(self.maps)).mean(axis=1),
                "rollout_correlation": map_correlation(rollout, self.maps.mean(axis=1)),
                "heads_patches": kept_mass_mask(self.maps).mean(axis=(1, 2, 3)),
                "rollout_patches": kept_mass_mask(rollout).mean(axis=(1, 2)),
            }
        )

    def key_numbers(self) -> list[KeyNumber]:
        """Share of attention on prefix tokens, and correlation over patches between two heads' maps; means over images."""
        return [
            ("attention on prefix tokens", "share", float(self.prefix_mass.mean())),
            ("correlation of heads", "", float(pd.Series(head_correlation(self.maps).ravel()).mean())),
        ]

    @property
    def panel_title(self) -> str:
        """Title of the result's panel in the overview."""
        return "Class attention\n(input, head 0)"

    def plot_panel(self, *, ax: Axes) -> Axes:
        """Draw the first two images and the first head."""
        return self.plot(ax=ax, count=2, heads=[0])

    def plot(self, *, ax: Axes | None = None, count: int = 8, heads: Sequence[int] | None = None) -> Axes:
        """Draw each image beside the class token's attention, one colour per head.

        Args:
            ax: Where to draw; a new figure if None.
            count: How many images to draw, from the first.
            heads: Which heads to draw; all if None.
        """
        from vit_probe.plots.class_attention import plot_class_attention

        return plot_class_attention(self.maps[:count], None if self.images is None else self.images[:count], heads=heads, ax=ax)


@streaming_measure(result=ClassAttentionResult, shows_images=True)
def class_attention(run: AttentionRun, *, layer: int = -1) -> ClassAttention:
    """Attention of the class token to the patches in one layer, head by head: softmax weights, not rescaled.

    Only the class token's row of the attention is computed, and the model's own fused attention runs, so the measure adds
    almost nothing to the forward pass, whatever the number of tokens.

    Args:
        layer: Which layer; negative numbers count from the end, so that -1 is the last.

    Raises:
        InputError: If the model has no class token, attends within windows, or has no such layer; if the images cannot be used,
            the grid does not fit the attention, or no attention is seen.

    References:
        Caron et al. 2021, arXiv:2104.14294, figures 1 and 3.

    Examples:
        >>> import torch
        >>> from vit_probe import class_attention, load_model
        >>> class_attention(load_model("demo"), torch.zeros(1, 3, 64, 64)).maps.shape  # image, head, row, col
        (1, 6, 8, 8)
    """
    return ClassAttention(run.grid, run.layers, layer=layer, windows=run.windows)


class ClassAttention(PerImageMaps):
    """The streaming measure behind `class_attention`; an observer for `attention_hooks`.

    Args:
        grid: Where the patches lie.
        layers: Path of each layer's module, as `AttentionRun.layers` lists them.
        layer: See `class_attention`.
        windows: The layers whose attention does not cover all tokens of `grid`; must be empty or None.

    Raises:
        InputError: If there is no class token, `windows` names any layer, or the model has no such `layer`.

    Examples:
        >>> import torch
        >>> from vit_probe import load_model
        >>> run = AttentionRun(load_model("demo"), torch.zeros(1, 3, 64, 64))
        >>> measure = ClassAttention(run.grid, run.layers, layer=0)
        >>> run.observe(measure)
        >>> measure.compute().maps.shape
        (1, 6, 8, 8)
    """

    name = "class_attention"
    display_name = "maps of the class token's attention"

    def __init__(
        self,
        grid: TokenGrid,
        layers: Sequence[str],
        *,
        layer: int = -1,
        windows: Mapping[int, Windows] | None = None,
    ) -> None:
        super().__init__(grid)
        if windows:
            raise InputError(
                f"class_attention needs attention over all patches, but {len(windows)} layers of this model (the first is "
                f"layer {min(windows)}) attend within windows or over merged patches; use mean_attention_distance"
            )
        class_token = grid.find_class_token()
        if class_token is None:
            raise InputError(
                "this model has no class token whose attention could be shown; attention_rollout takes the mean over the "
                "patches' queries where there is none"
            )
        if not -len(layers) <= layer < len(layers):
            raise InputError(f"layer is {layer}, but this model has layers 0 to {len(layers) - 1} (or -{len(layers)} to -1)")
        self.layer = layer % len(layers)
        self.module = layers[self.layer]
        self._query = slice(class_token, class_token + 1)
        self._compute = TiledAttention(TILE_BYTES)
        self._rows: list[Tensor] = []  # of the current batch, (image, head, key), one per group of images

    @property
    def options(self) -> dict[str, Any]:
        return {"layer": self.layer}

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        """Compute the class token's row from its queries alone, and return False: no tiles are needed."""
        if inputs.layer == self.layer:
            bias = None if inputs.bias is None else inputs.bias[:, :, self._query]
            self._compute(replace(inputs, query=inputs.query[:, :, self._query], bias=bias), None, [self])
        return False

    def update(self, tile: AttentionTile) -> None:
        """Add a tile's part of the class token's row."""
        if tile.layer != self.layer or tile.queries.start > 0:
            return
        self.grid.check_tokens(tile.num_tokens)
        if tile.images.start == tile.heads.start == 0:
            self._finish_batch()
        row = tile.probabilities[:, :, 0].to("cpu", torch.float32, copy=True)
        if tile.heads.start == 0:
            self._rows.append(row)
        else:
            self._rows[-1] = torch.cat([self._rows[-1], row], dim=1)

    def roll_back(self) -> None:
        """Forget everything since `begin_batch`, even if the batch has ended."""
        super().roll_back()
        self._rows = []

    def compute(
        self, provenance: dict[str, Any] | None = None, *, names: list[str] | None = None, images: np.ndarray | None = None
    ) -> ClassAttentionResult:
        """The result over all images so far.

        Raises:
            InputError: If there were none.
        """
        return ClassAttentionResult(
            **self._result(provenance, names, images),
            layer=self.layer,
            module=self.module,
        )

    def _finish_batch(self) -> None:
        if self._rows:
            patches = torch.cat(self._rows)[:, :, self.grid.patch_tokens]
            self._maps.append(patches.unflatten(2, (self.grid.rows, self.grid.cols)).contiguous().numpy())
            self._rows = []
