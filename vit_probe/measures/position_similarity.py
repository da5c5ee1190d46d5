"""How alike the position embeddings of two patches are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.errors import InputError
from vit_probe.geometry import find_token_grid
from vit_probe.results import Result, check_finite, software_versions
from vit_probe.run import model_provenance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PositionSimilarityResult", "position_similarity"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PositionSimilarityResult(Result):
    """Cosine similarity of each patch's position embedding with every other's.

    Args:
        similarity: (row, col, row, col), from -1 to 1.
    """

    similarity: Float[np.ndarray, "row col row col"]

    def to_dataframe(self, rows: Sequence[int] | None = None, cols: Sequence[int] | None = None) -> pd.DataFrame:
        """One row a pair of patches: row, col, other_row, other_col, similarity; row and col among those given, if any are."""
        height, width = self.similarity.shape[:2]
        tiles = np.arange(height) if rows is None else np.asarray(rows), np.arange(width) if cols is None else np.asarray(cols)
        index = np.meshgrid(*tiles, np.arange(height), np.arange(width), indexing="ij")
        columns = {name: i.ravel() for name, i in zip(("row", "col", "other_row", "other_col"), index, strict=True)}
        return pd.DataFrame(columns | {"similarity": self.similarity[np.ix_(*tiles)].ravel()})

    def summary(self) -> pd.DataFrame:
        """One row: grid, mean similarity of neighbouring patches, and of all pairs."""
        rows, cols = self.similarity.shape[:2]
        right = np.einsum("rcrc->rc", self.similarity[:, :-1, :, 1:])
        down = np.einsum("rcrc->rc", self.similarity[:-1, :, 1:, :])
        neighbours = np.concatenate([right.ravel(), down.ravel()])
        return pd.DataFrame(
            {
                "grid": [f"{rows} x {cols}"],
                "neighbours": [neighbours.mean() if len(neighbours) else np.nan],
                "all pairs": [self.similarity.mean()],
                "lowest": [self.similarity.min()],
            }
        )

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """A tile for each patch (evenly spaced ones of a large grid) that shows its similarity to all patches."""
        from vit_probe.plots import plot_position_similarity

        return plot_position_similarity(self.similarity, ax=ax)


def position_similarity(model: nn.Module) -> PositionSimilarityResult:
    """Cosine similarity of the position embeddings of all pairs of patches, at the model's native grid.

    Entries of prefix tokens are left out. A sine-cosine table is a table like a learned one.

    Args:
        model: A model with a table of absolute position embeddings: our own, or one of timm, transformers or torchvision.

    Raises:
        InputError: If the model holds no such table, or its grid cannot be told.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (centre), figure 10 and appendix D.4.
    """
    table, rows, cols = _position_table(model)
    vectors = table.detach().double().cpu().numpy()
    check_finite(vectors, "position embeddings")
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    similarity = np.clip(vectors @ vectors.T, -1, 1).astype(np.float32).reshape(rows, cols, rows, cols)
    provenance: dict[str, Any] = {"model": model_provenance(model), "options": {}, "versions": software_versions()}
    return PositionSimilarityResult(similarity=similarity, provenance=provenance | {"grid": {"rows": rows, "cols": cols}})


def _position_table(model: nn.Module) -> tuple[Float[Tensor, "patch dim"], int, int]:
    """The entries of the patches, with rows and columns of their grid."""
    if callable(table := getattr(model, "position_table", None)):  # our own
        if (own := table()) is None:
            raise InputError("this model has no position embedding (position='none'); there is nothing to compare")
        return cast(tuple[Tensor, int, int], own)
    names = ("pos_embed", "position_embeddings", "pos_embedding", "position_embedding.weight", "positional_embedding")
    tables = [parameter for name, parameter in model.named_parameters() if name.endswith(names)]
    size = getattr(getattr(model, "config", model), "image_size", None) or getattr(
        getattr(model, "patch_embed", None), "img_size", None
    )
    if not tables or size is None:
        raise InputError(
            f"{type(model).__name__} holds no table of absolute position embeddings (models with rotary or relative positions "
            "do not); measure how position shows in attention instead, with mean_attention_distance"
        )
    height, width = (size, size) if isinstance(size, int) else size
    grid = find_token_grid(model, height, width)
    table = tables[0].reshape(-1, tables[0].shape[-1])
    if not 0 <= len(table) - grid.num_patches <= grid.num_prefix_tokens:
        raise InputError(f"the position table of {type(model).__name__} has {len(table)} entries, which does not fit {grid}")
    return table[len(table) - grid.num_patches :], grid.rows, grid.cols
