"""All that is measured of a model, and the few numbers that say the most of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn

from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images
from vit_probe.errors import InputError, TokensNotSeen
from vit_probe.measures.attention_distance import AttentionDistance, AttentionDistanceResult
from vit_probe.measures.attention_entropy import AttentionEntropy, AttentionEntropyResult
from vit_probe.measures.base.per_image import SHOWN_IMAGES
from vit_probe.measures.class_attention import ClassAttention, ClassAttentionResult
from vit_probe.measures.map_statistics import head_correlation, map_correlation
from vit_probe.measures.patch_filters import PatchFiltersResult, low_frequency_share, patch_filters
from vit_probe.measures.position_similarity import (
    PositionSimilarityResult,
    patches_apart,
    position_nearness,
    position_similarity,
)
from vit_probe.measures.representation_similarity import RepresentationSimilarity, RepresentationSimilarityResult
from vit_probe.measures.rollout import AttentionRollout, AttentionRolloutResult
from vit_probe.measures.token_norms import TokenNorms, TokenNormsResult
from vit_probe.results import Result
from vit_probe.runner.run import AttentionRun

__all__ = ["Overview", "overview"]


@dataclass(frozen=True)
class Overview:
    """What every measure says of a model on the same images.

    Args:
        results: By the name of the measure: attention_distance, attention_entropy, token_norms, representation_similarity,
            patch_filters, position_similarity, rollout, class_attention (of the last layer); those that this model has.
        left_out: Why it does not have the others.
    """

    results: dict[str, Result]
    left_out: dict[str, str]

    def numbers(self) -> pd.DataFrame:
        """One row a number: measure, number, unit, value.

        - attention_distance, attention_entropy: the lowest and the highest head, their difference (range of heads), the mean
          over layers of such a difference within the layer, and uniform attention (mean over layers); attention_entropy also
          the part of attention on prefix tokens and on the query itself, means over heads.
        - token_norms: median norm after the first and the last layer, and the part of artifacts after the last.
        - representation_similarity: of the first and the last layer, and the mean of neighbouring layers (CKA).
        - patch_filters: `low_frequency_share` of the components, and the variance that they explain together.
        - position_similarity: mean of direct neighbours, and of patches further apart than half the grid's longer side; and
          `position_nearness`.
        - rollout: the largest value of a map over its mean (1 if all patches have the same), median over images; and the
          correlation over patches of the maps of two images, median over pairs.
        - class_attention: the part on prefix tokens, and the correlation over patches of the maps of two heads, means over
          images.

        NaN where there is nothing to take a number of, such as two images of one.
        """
        rows = [
            (measure, number, unit, float(value))
            for measure, result in self.results.items()
            for number, unit, value in _NUMBERS[measure](result)
        ]
        return pd.DataFrame(rows, columns=["measure", "number", "unit", "value"])

    def panels(self) -> dict[str, Callable[..., Any]]:
        """By title, what draws each measure on small axes given as `ax`; for `plot_comparison`.

        Of rollout and class attention (of the first head) the first two photographs are drawn.
        """
        from vit_probe.plots.comparison import plot_range

        drawings = {name: partial(result.plot, **_SMALL.get(name, {})) for name, result in self.results.items()}
        if "token_norms" in self.results:
            drawings["token_norms"] = partial(plot_range, self.results["token_norms"].to_dataframe())
        return {_TITLES[name]: drawing for name, drawing in drawings.items()}


def overview(
    model: nn.Module,
    images: Images,
    *,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> Overview:
    """Measures all that can be measured of a model on some images, in one pass.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`. Where its blocks do not show
            their tokens, the images go through it once more, for the measures of attention alone.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images a forward pass.
        device: Where to run: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        InputError: If the images cannot be used, no attention is seen, or numbers are not finite; or if the blocks turn out
            not to show their tokens when an iterator has been gone through.
    """
    left_out: dict[str, str] = {}

    def attempt(name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except InputError as error:
            left_out[name] = str(error)
            return None

    run = AttentionRun(
        model, images, preprocessing=preprocessing, batch_size=batch_size, device=device, keep_images=SHOWN_IMAGES
    )
    rollout = partial(AttentionRollout, run.grid, windows=run.windows)
    attended = partial(ClassAttention, run.grid, run.layers, windows=run.windows)

    def observed(of_tokens: Mapping[str, Any]) -> dict[str, Any]:
        """The measures by name, after a pass."""
        measures = {
            "attention_distance": AttentionDistance(run.grid, windows=run.windows),
            "attention_entropy": AttentionEntropy(run.grid, windows=run.windows),
            **of_tokens,
            "rollout": attempt("rollout", rollout),
            "class_attention": attempt("class_attention", attended),
        }
        measures = {name: measure for name, measure in measures.items() if measure is not None}
        run.observe(*measures.values())
        return measures

    try:
        of_tokens = TokenNorms(run.layers), RepresentationSimilarity(run.layers)
        measures = observed(dict(zip(_OF_TOKENS, of_tokens, strict=True)))
    except TokensNotSeen as error:
        if run.images.names and isinstance(images, Iterator):
            raise
        left_out |= dict.fromkeys(_OF_TOKENS, str(error))
        measures = observed({})
    kept = {"names": run.images.names, "images": run.images.kept()}
    results = {}
    for name, measure in measures.items():
        more = kept if name in ("rollout", "class_attention") else {}
        compute = partial(measure.compute, run.provenance(measure.options), **more)
        # Of few images there is no similarity.
        results[name] = attempt(name, compute) if name == "representation_similarity" else compute()
    results["patch_filters"] = attempt("patch_filters", partial(patch_filters, model))
    results["position_similarity"] = attempt("position_similarity", partial(position_similarity, model))
    return Overview({name: results[name] for name in _TITLES if results.get(name) is not None}, left_out)


_OF_TOKENS = ("token_norms", "representation_similarity")
_Numbers = list[tuple[str, str, float]]


def _of_heads(unit: str, values: Float[np.ndarray, "layer head"], uniform: Float[np.ndarray, "layer"]) -> _Numbers:
    lowest, highest = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
    return [
        ("lowest head", unit, lowest.min()),
        ("highest head", unit, highest.max()),
        ("range of heads", unit, highest.max() - lowest.min()),
        ("range within a layer", unit, (highest - lowest).mean()),
        ("uniform attention", unit, uniform.mean()),
    ]


def _of_distance(result: AttentionDistanceResult) -> _Numbers:
    return _of_heads("px", result.distance, result.uniform_distance)


def _of_entropy(result: AttentionEntropyResult) -> _Numbers:
    return [
        *_of_heads("nats", result.entropy, result.uniform_entropy),
        ("attention on prefix tokens", "part", np.nanmean(result.prefix_mass)),
        ("attention on itself", "part", np.nanmean(result.self_mass)),
    ]


def _of_norms(result: TokenNormsResult) -> _Numbers:
    table = result.to_dataframe()
    first, last = table.iloc[0], table.iloc[-1]
    return [
        ("after the first layer", "norm", first["median"]),
        ("after the last layer", "norm", last["median"]),
        ("artifacts", "part", last["artifacts"]),
    ]


def _of_layers(result: RepresentationSimilarityResult) -> _Numbers:
    return [
        ("first and last layer", "CKA", result.similarity[0, -1]),
        ("neighbouring layers", "CKA", _mean(np.diagonal(result.similarity, 1))),
    ]


def _of_filters(result: PatchFiltersResult) -> _Numbers:
    return [
        ("low frequencies", "part", _or_nan(lambda: low_frequency_share(result.filters))),
        ("explained variance", "part", result.explained_variance_ratio.sum()),
    ]


def _of_positions(result: PositionSimilarityResult) -> _Numbers:
    rows, cols = result.similarity.shape[:2]
    apart = patches_apart(rows, cols)
    alike = result.similarity.reshape(rows * cols, -1).astype(np.float64)
    return [
        ("neighbours", "cosine", _mean(alike[apart == 1])),
        ("far apart", "cosine", _mean(alike[apart > max(rows, cols) / 2])),
        ("correlation with distance", "", _or_nan(lambda: position_nearness(result.similarity))),
    ]


def _of_rollout(result: AttentionRolloutResult) -> _Numbers:
    maps = result.maps.astype(np.float64)
    one, other = np.triu_indices(len(maps), 1)
    return [
        ("largest over mean", "", float(np.median(maps.max(axis=(1, 2)) / maps.mean(axis=(1, 2))))),
        ("correlation of images", "", pd.Series(map_correlation(maps[one], maps[other])).median()),
    ]


def _of_class_attention(result: ClassAttentionResult) -> _Numbers:
    return [
        ("attention on prefix tokens", "part", result.prefix_mass.mean()),
        ("correlation of heads", "", pd.Series(head_correlation(result.maps).ravel()).mean()),
    ]


_TITLES = {
    "attention_distance": "Attention distance\n(pixels)",
    "attention_entropy": "Attention entropy\n(nats)",
    "token_norms": "Token norms\n(median and range)",
    "representation_similarity": "Layers' similarity\n(CKA)",
    "patch_filters": "Patch filters\n(components)",
    "position_similarity": "Position similarity\n(cosine)",
    "rollout": "Rollout\n(input, attention)",
    "class_attention": "Class attention\n(input, head 0)",
}
_SMALL: dict[str, dict[str, Any]] = {"rollout": {"count": 2}, "class_attention": {"count": 2, "heads": [0]}}
_NUMBERS: dict[str, Callable[[Any], _Numbers]] = {
    "attention_distance": _of_distance,
    "attention_entropy": _of_entropy,
    "token_norms": _of_norms,
    "representation_similarity": _of_layers,
    "patch_filters": _of_filters,
    "position_similarity": _of_positions,
    "rollout": _of_rollout,
    "class_attention": _of_class_attention,
}


def _mean(values: Float[np.ndarray, "pair"]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _or_nan(number: Callable[[], float]) -> float:
    """The number; NaN where there is none, as of one patch."""
    with suppress(InputError):
        return number()
    return float("nan")
