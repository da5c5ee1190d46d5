"""How alike the positions of two patches are to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.errors import InputError
from vit_probe.models.config import as_pair
from vit_probe.results import Result, check_finite, software_versions
from vit_probe.runner.run import model_provenance
from vit_probe.tokens.grid import TokenGrid, input_channels, read_patch_size
from vit_probe.tokens.hidden_states import patch_tokens
from vit_probe.tokens.locate import locate_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PositionSimilarityResult",
    "patches_apart",
    "position_nearness",
    "position_similarity",
]


_ALIKE = 1e-4  # of the tokens' size: smaller differences are rounding
_MOST_PREFIX = 16  # entries that a table may hold for prefix tokens


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PositionSimilarityResult(Result):
    """Cosine similarity of each patch's position with every other's.

    Args:
        similarity: (row, col, row, col), from -1 to 1.
        after_layers: The layers that the tokens of a constant image had passed; None for a table of position embeddings.
    """

    similarity: Float[np.ndarray, "row col row col"]
    after_layers: int | None = None

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

    @property
    def title(self) -> str:
        """What the figure is called."""
        if self.after_layers is None:
            return "Position embedding similarity"
        return f"Position similarity after {_layers(self.after_layers)}"

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """A tile for each patch (evenly spaced ones of a large grid) that shows its similarity to all patches."""
        from vit_probe.plots import plot_position_similarity

        return plot_position_similarity(self.similarity, title=self.title, ax=ax)


def position_similarity(
    model: nn.Module, *, after_layers: int | None = None, image_size: int | tuple[int, int] | None = None
) -> PositionSimilarityResult:
    """Cosine similarity of the positions of all pairs of patches.

    Of a model with a table of absolute position embeddings (learned or sine-cosine), these are the table's entries at its
    native grid, entries of prefix tokens left out.

    Of any other (rotary or relative positions), and of every model with `after_layers`, they are the tokens that a constant
    image leaves behind. Its patches all look alike, so that whatever tells two tokens apart is position. The image is zero
    after standardisation, the mean colour. The patch tokens that have passed the first `after_layers` layers are centred
    (their mean over the patches is subtracted: what they share says nothing of position) and then compared. With 0 layers
    they are what enters the first layer: the table's entries, centred, where a table is added to the patches.

    Args:
        model: Our own, or any other; without a table, its attention must go through `scaled_dot_product_attention`.
        after_layers: How many layers the tokens have passed; if None, the table, or half of the layers (rounded up) where
            there is none.
        image_size: Height and width, or one side, of the constant image; the model's native size if None.

    Raises:
        InputError: If there is no table and no native size, fewer layers, or the tokens of a constant image are all alike
            (rotary or relative positions without any prefix token or padding leave no trace on it).

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (centre), figure 10 and appendix D.4, for the table.
    """
    if after_layers is None and image_size is None and (found := _position_table(model)) is not None:
        table, rows, cols = found
        vectors = table.detach().cpu().double().numpy()
    else:
        tokens, grid, after_layers = _constant_image_tokens(model, after_layers, image_size)
        rows, cols = grid.rows, grid.cols
        vectors = tokens - tokens.mean(axis=0)
        if np.abs(vectors).max() <= _ALIKE * np.abs(tokens).max():
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


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _constant_image_tokens(
    model: nn.Module, after_layers: int | None, image_size: int | tuple[int, int] | None
) -> tuple[Float[np.ndarray, "patch dim"], TokenGrid, int]:
    """The patch tokens of a constant image after some layers, their grid, and how many layers that is."""
    size = _native_size(model) if image_size is None else image_size
    if size is None:
        raise InputError(
            f"{type(model).__name__} has no table of position embeddings and names no image size; pass image_size= for the "
            "constant image to be shown to it"
        )
    height, width = as_pair(size, "image_size")
    found = locate_tokens(model, height, width)
    depth = len(found.layers)
    after_layers = (depth + 1) // 2 if after_layers is None else after_layers
    if not 0 <= after_layers <= depth:
        raise InputError(f"after_layers must be from 0 to {depth}, the layers of {type(model).__name__}; got {after_layers}")
    tokens, grid = patch_tokens(model, torch.zeros(1, input_channels(model), height, width), found, after_layers)
    return tokens[0].cpu().double().numpy(), grid, after_layers


def _native_size(model: nn.Module) -> Any:
    """The size of the images that the model is made for, where it says so."""
    preprocessing = getattr(model, "preprocessing", None)
    places = (model, "config", "image_size"), (model, "patch_embed", "img_size")
    sizes = [getattr(getattr(owner, part, None), name, None) for owner, part, name in places]
    return next((s for s in (*sizes, getattr(model, "image_size", None), getattr(preprocessing, "size", None)) if s), None)


def _position_table(model: nn.Module) -> tuple[Float[Tensor, "patch dim"], int, int] | None:
    """The entries of the patches, with rows and columns of their grid; None if there is no such table."""
    if callable(table := getattr(model, "position_table", None)):  # our own
        return cast("tuple[Tensor, int, int] | None", table())
    names = ("pos_embed", "position_embeddings", "pos_embedding", "position_embedding.weight", "positional_embedding")
    tables = [parameter for name, parameter in model.named_parameters() if name.endswith(names)]
    size = _native_size(model)
    if not tables or size is None:
        return None
    patch_size = read_patch_size(model)
    rows, cols = (length // patch for length, patch in zip(as_pair(size, "image_size"), patch_size, strict=True))
    flat = [table.reshape(-1, table.shape[-1]) for table in tables]
    # Of several tables (one of a text tower, say) the one with min_batch_size entries beyond those of the patches.
    table = min(flat, key=lambda table: (len(table) < rows * cols, abs(len(table) - rows * cols)))
    if not 0 <= len(table) - rows * cols <= _MOST_PREFIX:
        raise InputError(
            f"the position table of {type(model).__name__} has {len(table)} entries, which does not fit {rows} x {cols} "
            "patches; pass image_size= (and after_layers=) to compare the tokens of a constant image instead"
        )
    return table[len(table) - rows * cols :], rows, cols


def patches_apart(rows: int, cols: int) -> Float[np.ndarray, "patch patch"]:
    """How far the centres of any two patches of a grid lie apart, counted in patches; patches row by row."""
    places = np.indices((rows, cols)).reshape(2, -1).T
    return np.asarray(np.linalg.norm(places[:, None] - places[None], axis=-1))


def position_nearness(similarity: Float[np.ndarray, "row col row col"]) -> float:
    """Correlation (Pearson) of the similarity of two patches' positions with how far they lie apart.

    Over all pairs of different patches, distances between their centres counted in patches. Below 0 where near patches are
    more alike than distant ones, 0 where positions tell nothing of nearness, -1 only where similarity falls along a straight
    line. The ViT paper shows maps and gives no number; this one is a definition of this package.

    Args:
        similarity: As `position_similarity` gives it.

    Raises:
        InputError: If the shape is another, or no two pairs differ in similarity or in distance.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5, figure 7 (centre) and figure 10, for the maps.
    """
    values = np.asarray(similarity, dtype=np.float64)
    if values.ndim != 4 or values.shape[:2] != values.shape[2:]:
        raise InputError(f"similarity has shape {values.shape}; it must be (row, col, row, col), the same grid twice")
    rows, cols = values.shape[:2]
    pairs = ~np.eye(rows * cols, dtype=bool)
    apart = patches_apart(rows, cols)[pairs]
    alike = values.reshape(rows * cols, -1)[pairs]
    if not (len(apart) and np.ptp(apart) > 0 and np.ptp(alike) > 0):
        raise InputError(
            f"all pairs of the {rows} x {cols} patches are equally far apart or equally alike; "
            "a correlation needs pairs that differ in both"
        )
    return float(np.corrcoef(apart, alike)[0, 1])
