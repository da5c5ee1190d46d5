"""What each head of a layer has the class token attend to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.attention.tiles import TILE_BYTES, AttentionInputs, AttentionTile, TiledAttention
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images
from vit_probe.errors import InputError
from vit_probe.measures.base.per_image import SHOWN_IMAGES, PerImageMaps
from vit_probe.measures.map_statistics import head_correlation, kept_mass_mask, map_correlation
from vit_probe.results import Result
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid, Windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ClassAttention", "ClassAttentionResult", "class_attention"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ClassAttentionResult(Result):
    """The class token's attention to the patches, a map for every head of a layer and every image.

    Args:
        maps: (image, head, row, col), softmax weights; what is missing to a sum of 1 is `prefix_mass`.
        images: uint8 (image, height, width, channel), the first 64 images as the model saw them; None if their preprocessing
            is unknown.
        names: Name of each image.
        layer: Which layer, from 0.
        module: Path of its module.
    """

    maps: np.ndarray
    images: np.ndarray | None
    names: list[str]
    layer: int
    module: str

    @property
    def prefix_mass(self) -> np.ndarray:
        """(image, head), the part of the attention on prefix tokens: the class token itself and registers."""
        return np.clip(1 - self.maps.sum(axis=(2, 3), dtype=np.float64), 0, 1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a patch of an image in a head: image, name, head, row, col, attention."""
        image, head, row, col = (index.ravel() for index in np.indices(self.maps.shape))
        name = np.asarray(self.names, dtype=object)[image]
        return pd.DataFrame(
            {"image": image, "name": name, "head": head, "row": row, "col": col, "attention": self.maps.ravel()}
        )

    def summary(self) -> pd.DataFrame:
        """One row a head, means over images: the part on prefix tokens, the part of the patches that holds 60 % of the rest,
        and the correlation over the patches with the other heads (without images where this head's map is constant).
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
        """One row an image that tells these maps from its rollout: name; heads_correlation, the mean over pairs of heads of
        their maps' correlation over the patches (without constant maps); rollout_correlation, that of rollout with the mean
        over heads; heads_patches and rollout_patches, the part of the patches that holds 60 % of a head's map (mean over
        heads), and of rollout.
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

    def plot(self, *, ax: Axes | None = None, count: int = 8, heads: Sequence[int] | None = None) -> Axes:
        """The first `count` images, each beside its attention in all heads, or in those that are named, in colours."""
        from vit_probe.plots.class_attention import plot_class_attention

        return plot_class_attention(self.maps[:count], None if self.images is None else self.images[:count], heads=heads, ax=ax)


def class_attention(
    model: nn.Module,
    images: Images,
    *,
    layer: int = -1,
    grid: TokenGrid | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> ClassAttentionResult:
    """What the class token attends to in one layer, head by head: softmax weights over the patches, not rescaled.

    Only the class token's queries are looked at, so that the model's own fused attention runs and it costs next to nothing
    beside the forward pass, with any number of tokens.

    Args:
        model: Any Vision Transformer with a class token whose attention goes through `scaled_dot_product_attention`.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches.
        layer: Which layer; negative numbers count from the end, so that -1 is the last.
        grid: Where the patches lie; read from the model if None.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images a forward pass.
        device: Where to run: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        InputError: If the model has no class token, attends within windows, or has no such layer; if the images cannot be used,
            the grid does not fit the attention, or no attention is seen.

    References:
        Caron et al. 2021, arXiv:2104.14294, figures 1 and 3.
    """
    run = AttentionRun(
        model, images, grid=grid, preprocessing=preprocessing, batch_size=batch_size, device=device, keep_images=SHOWN_IMAGES
    )
    measure = ClassAttention(run.grid, run.layers, layer=layer, windows=run.windows)
    run.observe(measure)
    return measure.compute(run.provenance(measure.options), names=run.images.names, images=run.images.kept())


class ClassAttention(PerImageMaps):
    """The streaming measure behind `class_attention`; an observer for `attention_hooks`.

    Args:
        grid: Where the patches lie.
        layers: Module path of each self-attention layer, as `AttentionRun.layers` has them.
        layer: See `class_attention`.
        windows: The layers whose attention is not over all the tokens of `grid`; there may be none.

    Raises:
        InputError: If there is no class token, there are such layers, or `layer` is none of the model's.
    """

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
                f"the class token's attention is over all patches, but {len(windows)} layers of this model (the first is layer "
                f"{min(windows)}) attend within windows or over merged patches; use mean_attention_distance"
            )
        if not grid.has_cls_token:
            raise InputError(
                "this model has no class token whose attention could be shown; attention_rollout takes the mean over the "
                "patches' queries where there is none"
            )
        if not -len(layers) <= layer < len(layers):
            raise InputError(f"layer is {layer}, but this model has layers 0 to {len(layers) - 1} (or -{len(layers)} to -1)")
        self.layer = layer % len(layers)
        self.module = layers[self.layer]
        self._compute = TiledAttention(TILE_BYTES)
        self._rows: list[Tensor] = []  # of the current batch, (image, head, key), a group of images each

    @property
    def options(self) -> dict[str, Any]:
        return {"layer": self.layer}

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        """Told of a layer before its tiles, of which none is needed: the class token's row follows from its queries alone."""
        if inputs.layer == self.layer:
            bias = None if inputs.bias is None else inputs.bias[:, :, :1]
            self._compute(replace(inputs, query=inputs.query[:, :, :1], bias=bias), None, [self])
        return False

    def update(self, tile: AttentionTile) -> None:
        """Adds what a tile holds of the class token's row."""
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
        """Forgets what came since `begin_batch`, also where the batch had ended."""
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
            patches = torch.cat(self._rows)[:, :, self.grid.num_prefix_tokens :]
            self._maps.append(patches.unflatten(2, (self.grid.rows, self.grid.cols)).contiguous().numpy())
            self._rows = []
