"""Similarity of the positions of patches to a model, and how it falls with their distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.attention.arguments import check_model
from vit_probe.attention.wrappers import unwrap
from vit_probe.errors import InputError
from vit_probe.measures.base.registry import model_measure
from vit_probe.models.config import as_pair
from vit_probe.results import KeyNumber, Result, check_finite, software_versions
from vit_probe.runner.run import model_provenance
from vit_probe.tokens.added_positions import added_positions
from vit_probe.tokens.grid import TokenGrid
from vit_probe.tokens.hidden_states import patch_tokens
from vit_probe.tokens.locate import locate_tokens
from vit_probe.tokens.patch_embedding import input_channels, native_image_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PositionSimilarityResult",
    "patch_distances",
    "position_nearness",
    "position_similarity",
]


_EQUAL_TOLERANCE = 1e-4  # relative to the tokens' size; smaller differences are rounding


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PositionSimilarityResult(Result):
    """Cosine similarity of the positions of all pairs of patches.

    Args:
        similarity: (row, col, row, col), from -1 to 1.
        after_layers: After how many layers the tokens of a constant image were compared; None if the position embeddings were
            compared.
    """

    measure: str = "position_similarity"
    similarity: Float[np.ndarray, "row col row col"]
    after_layers: int | None = None

    def to_dataframe(self, rows: Sequence[int] | None = None, cols: Sequence[int] | None = None) -> pd.DataFrame:
        """One row per pair of patches: row, col, other_row, other_col, similarity; only of the given rows and cols, if any."""
        height, width = self.similarity.shape[:2]
        chosen = np.arange(height) if rows is None else np.asarray(rows), np.arange(width) if cols is None else np.asarray(cols)
        indices = np.meshgrid(*chosen, np.arange(height), np.arange(width), indexing="ij")
        columns = {name: index.ravel() for name, index in zip(("row", "col", "other_row", "other_col"), indices, strict=True)}
        return pd.DataFrame(columns | {"similarity": self.similarity[np.ix_(*chosen)].ravel()})

    def csv_table(self) -> pd.DataFrame:
        """The pairs that the figure shows, since all pairs of a large grid are millions of rows."""
        from vit_probe.plots.position_similarity import shown_patches

        return self.to_dataframe(*(shown_patches(size).tolist() for size in self.similarity.shape[:2]))

    def summary(self) -> pd.DataFrame:
        """One row: the grid, the mean similarity of neighbouring patches and of all pairs, and the lowest similarity."""
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

    @property
    def title(self) -> str:
        """Title of the figure."""
        if self.after_layers is None:
            return "Position embedding similarity"
        return f"Position similarity after {_layers(self.after_layers)}"

    def key_numbers(self) -> list[KeyNumber]:
        """Mean similarity of direct neighbours, and of patches further apart than half the grid's longer side; and
        `position_nearness` (NaN if it is undefined).
        """
        rows, cols = self.similarity.shape[:2]
        distance = patch_distances(rows, cols)
        similarity = self.similarity.reshape(rows * cols, -1).astype(np.float64)

        def mean(pairs: np.ndarray) -> float:
            return float(similarity[pairs].mean()) if pairs.any() else float("nan")

        try:
            nearness = position_nearness(self.similarity)
        except InputError:
            nearness = float("nan")
        return [
            ("neighbours", "cosine", mean(distance == 1)),
            ("far apart", "cosine", mean(distance > max(rows, cols) / 2)),
            ("correlation with distance", "", nearness),
        ]

    @property
    def panel_title(self) -> str:
        """Title of the result's panel in the overview."""
        return "Position similarity\n(cosine)"

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw a tile per patch (for large grids, per evenly spaced patch) with its similarity to all patches."""
        from vit_probe.plots import plot_position_similarity

        return plot_position_similarity(self.similarity, title=self.title, ax=ax)


@model_measure(result=PositionSimilarityResult, command="positions")
def position_similarity(
    model: nn.Module, *, after_layers: int | None = None, image_size: int | tuple[int, int] | None = None
) -> PositionSimilarityResult:
    """Cosine similarity of the positions of all pairs of patches.

    In a model with absolute position embeddings (learned or sine-cosine), what it adds to its patch tokens is compared, at its
    native grid: the entries of its table, or, where it computes something else from its parameters, that. Where it adds
    positions at several levels, those of the first are compared. It is run up to its first layer to find them.

    In all other models (rotary or relative positions), and whenever `after_layers` or another `image_size` is given, the patch
    tokens of a constant image are compared. All its patches look the same, so only position distinguishes their tokens. The
    image is zero after standardisation, which is the mean colour. The patch tokens after the first `after_layers` layers are
    centred (their mean over patches, which says nothing about position, is subtracted) before they are compared. With
    `after_layers=0`, they are the tokens that enter the first layer: what is added, centred, in models that add positions.

    Args:
        model: Any Vision Transformer; if it adds no positions, its attention must go through `scaled_dot_product_attention`.
        after_layers: After how many layers tokens are compared; if None, what is added is, or, if nothing is, the tokens after
            half of the layers (rounded up).
        image_size: Height and width, or one side, of the constant image; the model's native size if None. A model that names no
            native size is taken to be made for this one.

    Raises:
        InputError: If the model names no size and none is given, it has fewer layers than `after_layers`, or it gives all
            patches of a constant image the same token (as rotary or relative positions do without a prefix token or padding).

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (centre), figure 10 and appendix D.4, for the table.

    Examples:
        >>> from vit_probe import VisionTransformer, ViTConfig, position_similarity
        >>> model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
        >>> position_similarity(model).similarity.shape
        (4, 4, 4, 4)
    """
    check_model(model)
    model = unwrap(model)
    native = native_image_size(model)
    of_table = after_layers is None and (image_size is None or native is None)
    if of_table and (position_table := _position_table(model, native or image_size)) is not None:
        table, rows, cols = position_table
        vectors = table.detach().cpu().double().numpy()
    else:
        tokens, grid, after_layers = _constant_image_tokens(model, after_layers, image_size)
        rows, cols = grid.rows, grid.cols
        vectors = tokens - tokens.mean(axis=0)
        if np.abs(vectors).max() <= _EQUAL_TOLERANCE * np.abs(tokens).max():
            raise InputError(
                f"the tokens of a constant image are all alike after {_layers(after_layers)} of {type(model).__name__}; "
                + (
                    "positions come in later: raise after_layers"
                    if after_layers == 0
                    else "its positions leave no trace on them"
                )
            )
    check_finite(vectors, "position embeddings")
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    similarity = np.clip(vectors @ vectors.T, -1, 1).astype(np.float32).reshape(rows, cols, rows, cols)
    provenance: dict[str, Any] = {
        "model": model_provenance(model),
        "grid": {"rows": rows, "cols": cols},
        "options": {"after_layers": after_layers, "image_size": image_size},
        "versions": software_versions(),
    }
    return PositionSimilarityResult(similarity=similarity, after_layers=after_layers, provenance=provenance)


def position_nearness(similarity: Float[np.ndarray, "row col row col"]) -> float:
    """Pearson correlation between the similarity of two patches' positions and their distance.

    It is taken over all pairs of different patches, with distances between their centres. It is below 0 if near patches are
    more similar than distant ones, 0 if similarity has no linear relation to distance, and -1 only if it falls linearly with
    distance. The ViT paper shows maps and gives no number; this one is specific to vit_probe.

    Args:
        similarity: (row, col, row, col), as in the result of `position_similarity`.

    Raises:
        InputError: If the shape is wrong, or all pairs have the same similarity or the same distance.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5, figure 7 (centre) and figure 10, for the maps.

    Examples:
        >>> similarity = 1 - patch_distances(2, 3).reshape(2, 3, 2, 3) / 4
        >>> round(position_nearness(similarity), 6)
        -1.0
    """
    values = np.asarray(similarity, dtype=np.float64)
    if values.ndim != 4 or values.shape[:2] != values.shape[2:]:
        raise InputError(f"similarity has shape {values.shape}; it must be (row, col, row, col), the same grid twice")
    rows, cols = values.shape[:2]
    pairs = ~np.eye(rows * cols, dtype=bool)
    distances = patch_distances(rows, cols)[pairs]
    similarities = values.reshape(rows * cols, -1)[pairs]
    if not (len(distances) and np.ptp(distances) > 0 and np.ptp(similarities) > 0):
        raise InputError(
            f"all pairs of the {rows} x {cols} patches are equally far apart or equally similar; "
            "a correlation needs pairs that differ in both"
        )
    return float(np.corrcoef(distances, similarities)[0, 1])


def patch_distances(rows: int, cols: int) -> Float[np.ndarray, "patch patch"]:
    """Distance between the centres of any two patches of a grid, in units of patches; patches are numbered row by row.

    Examples:
        >>> patch_distances(1, 3)
        array([[0., 1., 2.],
               [1., 0., 1.],
               [2., 1., 0.]])
    """
    positions = np.indices((rows, cols)).reshape(2, -1).T
    return np.asarray(np.linalg.norm(positions[:, None] - positions[None], axis=-1))


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _constant_image_tokens(
    model: nn.Module, after_layers: int | None, image_size: int | tuple[int, int] | None
) -> tuple[Float[np.ndarray, "patch dim"], TokenGrid, int]:
    """The patch tokens of a constant image after some layers, their grid, and the number of these layers."""
    size = native_image_size(model) if image_size is None else image_size
    if size is None:
        raise InputError(
            f"{type(model).__name__} names no image size; pass image_size=, the size of the constant image to show to it"
        )
    height, width = as_pair(size, "image_size")
    layout = locate_tokens(model, height, width)
    depth = len(layout.layers)
    after_layers = (depth + 1) // 2 if after_layers is None else after_layers
    if not 0 <= after_layers <= depth:
        raise InputError(f"after_layers must be from 0 to {depth}, the layers of {type(model).__name__}; got {after_layers}")
    tokens, grid = patch_tokens(model, torch.zeros(1, input_channels(model), height, width), layout, after_layers)
    return tokens[0].cpu().double().numpy(), grid, after_layers


def _position_table(
    model: nn.Module, image_size: int | tuple[int, int] | None
) -> tuple[Float[Tensor, "patch dim"], int, int] | None:
    """What is added to the patches, with the rows and columns of their grid; None if nothing is or the size is unknown."""
    if callable(table := getattr(model, "position_table", None)):  # our own models
        return cast("tuple[Tensor, int, int] | None", table())
    return None if image_size is None else added_positions(model, *as_pair(image_size, "image_size"))
