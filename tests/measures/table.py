"""The table of all measures: what each is compared with, and on which models.

A new measure needs a row in `ROWS`; the tests in `test_table.py` and `test_every_measure.py` go by the registry and this table.
Measures that are registered here, as a user of the package would register them, have rows like the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests import reference
from tests.checkpoints.parity import randomize
from tests.example_models import Assemble, expected_attention, images, small_vit
from tests.families.timm import sam
from tests.measures.tiles import Tokens
from vit_probe import (
    attention_hooks,
    head_measure,
    layer_measure,
    offset_measure,
)
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import Windows

Values = dict[str, np.ndarray]


# Small models, in float64, so that numbers must agree to many digits


@dataclass(frozen=True)
class Setting:
    """A model, and the size of its images."""

    build: Callable[[], nn.Module]
    size: tuple[int, int]


def shifted_windows() -> nn.Module:
    """transformers' Swin: 6 x 12 patches, then 3 x 6, in windows of 3 x 3, every other layer's shifted and masked."""
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    sizes = dict(image_size=(24, 48), patch_size=4, window_size=3, embed_dim=16, depths=[2, 2], num_heads=[1, 2])
    return randomize(SwinModel(SwinConfig(**sizes)))


SETTINGS = {
    "registers": Setting(lambda: small_vit(num_registers=2), (24, 24)),  # 3 x 4 patches of 8 x 6 pixels
    "no class token": Setting(lambda: small_vit(class_token=False, pooling="avg"), (16, 36)),  # another size: 2 x 6 patches
    "square": Setting(lambda: small_vit(image_size=24, patch_size=8, depth=3), (24, 24)),  # 3 x 3 patches
    "shifted windows": Setting(shifted_windows, (24, 48)),
    "padded windows": Setting(
        lambda: randomize(sam((32, 40))), (32, 40)
    ),  # 4 x 5 patches in windows of 3 x 3, one layer without windows
}
WINDOWED = ("shifted windows", "padded windows")


# What a measure sees, by other means


@dataclass(frozen=True)
class Layer:
    """A layer of a model as literal references take it.

    Args:
        attention: (image, head, query, key), prefix tokens first, patches row by row. Attention within windows is unfolded to
            all patches of the image, 0 between windows; padding takes the place of prefix tokens.
        tokens: (image, patch, dim), the patch tokens after the block.
        windows: Where the tokens lie of a layer with windows.
    """

    attention: np.ndarray
    tokens: np.ndarray
    rows: int
    cols: int
    patch_size: tuple[int, int]
    num_prefix_tokens: int
    windows: Windows | None = None

    def uniform(self, *, to_visible_patches: bool) -> Layer:
        """This layer with uniform attention, of one head and one image.

        Args:
            to_visible_patches: Attend to the patches that masks do not hide, else to all tokens (of the window, if any).
        """
        if self.windows is None:
            tokens = self.attention.shape[-1]
            return replace(self, attention=np.full((1, 1, tokens, tokens), 1 / tokens))
        windows, tokens = self.windows, self.windows.patches.shape[1]
        weights = np.ones((len(windows.patches), 1, tokens, tokens))
        if to_visible_patches:
            weights = weights * (windows.patches >= 0).numpy()[:, None, None, :]
            if windows.masked_pairs is not None:
                weights = weights * ~windows.masked_pairs.numpy()[:, None]
        whole, _ = unfolded(weights / np.maximum(weights.sum(-1, keepdims=True), 1), windows)
        return replace(self, attention=whole)


@dataclass(frozen=True)
class Seen:
    """A model with all its layers."""

    model: Any
    layers: list[Layer]
    rows: int
    cols: int
    num_prefix_tokens: int


def unfolded(attention: np.ndarray, windows: Windows) -> tuple[np.ndarray, int]:
    """Attention (window, head, query, key) as attention among all patches of an image, and the number of padding tokens."""
    patches = windows.patches.tolist()
    padding = max(window.count(-1) for window in patches)
    tokens = padding + windows.grid.num_patches
    images, heads = len(attention) // len(patches), attention.shape[1]
    whole = np.zeros((images, heads, tokens, tokens))
    for image in range(images):
        for number, window in enumerate(patches):
            pads = iter(range(padding))
            places = [next(pads) if patch < 0 else padding + patch for patch in window]
            for query, query_place in enumerate(places):
                for key, key_place in enumerate(places):
                    whole[image, :, query_place, key_place] = attention[image * len(patches) + number, :, query, key]
    return whole, padding


IMAGES = 4  # as few as representation_similarity takes


@cache
def seen(setting: str) -> Seen:
    model, size = SETTINGS[setting].build().eval().double(), SETTINGS[setting].size
    x = images(*size, batch=IMAGES).double()
    run = AttentionRun(model, x, device="cpu")
    run.observe(tokens := Tokens())
    if run.windows:
        with torch.no_grad(), attention_hooks(model, assembled := Assemble()):
            model(x)
        attention = [assembled.layers[layer] for layer in range(len(run.layers))]
    else:
        attention = list(expected_attention(model, x))
    layers = []
    for number, weights in enumerate(attention):
        grid, prefix = run.layout.grid_of(number), run.grid.num_prefix_tokens
        if number in run.windows:
            weights, prefix = unfolded(weights, run.windows[number])
        place = grid.rows, grid.cols, grid.patch_size
        layers.append(Layer(weights, tokens.of(number), *place, prefix, run.windows.get(number)))
    return Seen(model, layers, run.grid.rows, run.grid.cols, run.grid.num_prefix_tokens)


# The literal references: of a layer for measures per head and per layer, with values of each image; else of the whole model


def one_by_one(function: Callable[[np.ndarray], Any], attention: np.ndarray) -> list[Any]:
    """A reference that averages over images, for one image at a time."""
    return [function(attention[None, image : image + 1]) for image in range(len(attention))]


def distance(layer: Layer, prefix: Any = "renormalize") -> Values:
    of_images = one_by_one(
        lambda attention: reference.mean_attention_distance(
            attention, layer.rows, layer.cols, layer.patch_size, layer.num_prefix_tokens, prefix
        ),
        layer.attention,
    )
    return {
        "distance": np.stack([one.mean[0] for one in of_images]),
        "patch_mass": np.stack([one.patch_mass[0] for one in of_images]),
        **(excluded(layer) if prefix == "renormalize" else {}),
    }


def excluded(layer: Layer) -> Values:
    """The share of queries that give patches no weight."""
    first = layer.num_prefix_tokens
    return {"excluded": (layer.attention[:, :, first:, first:].sum(-1) == 0).mean(-1)}


def entropy(layer: Layer) -> Values:
    of_images = one_by_one(lambda attention: reference.attention_entropy(attention, layer.num_prefix_tokens), layer.attention)
    fields = {"entropy": "mean", "prefix_mass": "prefix_mass", "self_mass": "self_mass"}
    return {name: np.stack([getattr(one, field)[0] for one in of_images]) for name, field in fields.items()}


def offset(layer: Layer) -> Values:
    found = reference.attention_offset(layer.attention[None], layer.rows, layer.cols, layer.patch_size, layer.num_prefix_tokens)
    return {name: getattr(found, name)[0] for name in ("dx", "dy", "aligned")} | excluded(layer)


def sinks(layer: Layer) -> Values:
    found = reference.attention_sinks(layer.attention[None], layer.num_prefix_tokens)
    return {"top_patch": found.top_patch[0]} | {
        f"prefix_{index}": found.prefix[0, ..., index] for index in range(layer.num_prefix_tokens)
    }


def near(layer: Layer, radius: float = 1.5, prefix: Any = "renormalize") -> Values:
    mass = reference.local_mass(layer.attention[None], layer.rows, layer.cols, radius, layer.num_prefix_tokens, prefix)[0]
    return {"local_mass": mass} | {name: value for name, value in distance(layer, prefix).items() if name != "distance"}


def alike(layer: Layer) -> Values:
    return {"token_similarity": reference.token_similarity(layer.tokens[None])[0]}


def spectrum(layer: Layer, profile: Any = "radial") -> Values:
    return {"feature_spectrum": reference.feature_spectrum(layer.tokens[None], layer.rows, layer.cols, profile)[0]}


def rolled_out(model: Seen, head_fusion: Any = "mean", discard_ratio: float = 0.0) -> Values:
    has_cls_token = model.num_prefix_tokens > 0
    attention = np.stack([layer.attention for layer in model.layers])
    matrices = reference.rollout(attention, head_fusion, discard_ratio, has_cls_token=has_cls_token)
    return {"maps": reference.rollout_map(matrices, model.rows, model.cols, model.num_prefix_tokens, has_cls_token)}


def of_the_class_token(model: Seen, layer: int = -1) -> Values:
    rows = model.layers[layer].attention[:, :, 0, model.num_prefix_tokens :]
    return {"maps": rows.reshape(*rows.shape[:2], model.rows, model.cols)}


def norms(model: Seen) -> Values:
    """Tokens in bins of 1/128 octave, by their norm."""
    bins = [
        [math.floor(128 * math.log2(math.hypot(*token))) for image in layer.tokens.tolist() for token in image]
        for layer in model.layers
    ]
    first, last = min(map(min, bins)), max(map(max, bins))
    counts = np.array([[layer.count(place) for place in range(first, last + 1)] for layer in bins])
    return {"counts": counts, "edges": 2.0 ** (np.arange(first, last + 2) / 128)}


def layers_alike(model: Seen) -> Values:
    tokens = [layer.tokens for layer in model.layers]
    return {"similarity": reference.centred_kernel_alignment(tokens, tokens, [IMAGES])}


def filters(model: Seen, components: int = 28) -> Values:
    weight = next(module.weight for module in model.model.modules() if isinstance(module, nn.Conv2d)).detach().numpy()
    available = min(components, len(weight) - 1)
    principal, shares = reference.patch_filter_pca(weight, available)
    return {"filters": principal, "explained_variance_ratio": shares}


def positions(model: Seen) -> Values:
    config = model.model.config
    rows, cols = (side // patch for side, patch in zip(config.image_size, config.patch_size, strict=True))
    table = model.model.pos_embed[0, -rows * cols :].detach().numpy()
    return {"similarity": reference.position_similarity(table, rows, cols)}


# Measures that a user of the package might define


def relu_of_offset(layer: Layer, direction: Any = "right", prefix: Any = "renormalize") -> Values:
    patches, first = layer.rows * layer.cols, layer.num_prefix_tokens
    mean = np.zeros(layer.attention.shape[:2])
    for image, head in np.ndindex(*mean.shape):
        for i in range(patches):
            weights = layer.attention[image, head, first + i, first:]
            for j in range(patches):
                pixels = {
                    "right": (j % layer.cols - i % layer.cols) * layer.patch_size[1],
                    "down": (j // layer.cols - i // layer.cols) * layer.patch_size[0],
                }[direction]
                total = weights.sum() if prefix == "renormalize" else 1
                mean[image, head] += weights[j] / total * max(pixels, 0) / patches
    return {"reach": mean} | {name: value for name, value in distance(layer, prefix).items() if name != "distance"}


def largest(layer: Layer) -> Values:
    first = layer.num_prefix_tokens
    weights = layer.attention[:, :, first:]
    itself = np.stack([weights[:, :, i, first + i] for i in range(layer.rows * layer.cols)], axis=-1)
    shares = [weights[..., first:].sum(-1).mean(-1), weights[..., :first].sum(-1).mean(-1), itself.mean(-1)]
    return {"largest_weight": weights[..., first:].max(-1).mean(-1), "shares": np.stack(shares, axis=-1)}


def unevenness(layer: Layer) -> Values:
    received = layer.attention[:, :, layer.num_prefix_tokens :, layer.num_prefix_tokens :].mean(axis=2)
    return {"unevenness": received.std(-1), "sorted": np.sort(received, axis=-1)[..., ::-1]}


def mean_norm(layer: Layer, power: float = 1.0) -> Values:
    return {"mean_norm": (np.linalg.norm(layer.tokens, axis=-1) ** power).mean(-1), "largest": np.abs(layer.tokens).max((1, 2))}


def channel_means(layer: Layer) -> Values:
    return {"channel_means": layer.tokens.mean(1)}


def define_measures() -> None:
    """Register them."""

    @offset_measure(unit="pixels", reference="a test", value="reach")
    def reach_one_way(dx: Tensor, dy: Tensor, *, direction: str = "right") -> Tensor:
        """How far heads attend in one direction.

        Args:
            direction: `right` or `down`.
        """
        return (dx if direction == "right" else dy).clamp_min(0)

    @head_measure(unit="share", reference="a test")
    def largest_weight(attention: Any) -> dict[str, Tensor]:
        """The largest weight on a patch, and the shares of patches, prefix tokens and the query itself."""
        shares = [attention.to_patches.sum(-1), attention.to_prefix.sum(-1), attention.to_self]
        return {"largest_weight": attention.to_patches.amax(-1), "shares": torch.stack(shares, dim=-1)}

    @head_measure(unit="share", reference="a test", attention="received")
    def uneven_attention(received: Any) -> dict[str, Tensor]:
        """How unevenly patches receive attention."""
        by_patches = received.by_patches
        return {"unevenness": by_patches.std(-1, correction=0), "sorted": by_patches.sort(-1, descending=True).values}

    @layer_measure(unit="norm", reference="a test")
    def token_length(tokens: Tensor, grid: Any, *, power: float = 1.0) -> dict[str, Tensor]:
        """Mean norm of the tokens, and their largest entry.

        Args:
            power: To which norms are raised.

        References:
            A test.
        """
        return {"mean_norm": (tokens.norm(dim=-1) ** power).mean(-1), "largest": tokens.abs().amax((1, 2))}

    @layer_measure(unit="mean", reference="a test", axis="channel")
    def channel_mean(tokens: Tensor, grid: Any) -> dict[str, Tensor]:
        """Mean of each channel."""
        return {"channel_means": tokens.mean(1)}


# The table


@dataclass(frozen=True)
class Row:
    """A measure with some options.

    Args:
        expected: The literal reference. For measures with values per head or per layer, it takes a `Layer` and returns the
            values of each image, (image, head, ...) or (image, ...); for others it takes all that was `Seen` and returns arrays
            of the result by name. Both take the options.
        options: Of the measure.
        fails: By setting, the message of the `InputError` where the measure cannot be taken.
        settings: Where the reference holds.
    """

    expected: Callable[..., Values]
    options: Mapping[str, Any] = field(default_factory=dict)
    fails: Mapping[str, str] = field(default_factory=dict)
    settings: Sequence[str] = tuple(SETTINGS)


NO_WINDOWS = dict.fromkeys(WINDOWED, "attend within windows or over merged patches")
NOT_SQUARE = {name: "the diagonal of frequencies needs a square grid" for name in SETTINGS if name != "square"}
NO_CLASS = dict.fromkeys(("no class token",), "no class token") | NO_WINDOWS
# On a constant image, a bias on relative positions mixes tokens that are all the same.
NO_TABLE = {"shifted windows": "its positions leave no trace on them"}

ROWS: dict[str, list[Row]] = {
    "attention_distance": [Row(distance), Row(distance, {"prefix": "drop"})],
    "attention_entropy": [Row(entropy)],
    "attention_offset": [Row(offset)],
    "attention_sinks": [Row(sinks, fails=NO_WINDOWS)],
    "class_attention": [Row(of_the_class_token, fails=NO_CLASS), Row(of_the_class_token, {"layer": 0}, fails=NO_CLASS)],
    "feature_spectrum": [Row(spectrum), Row(spectrum, {"profile": "diagonal"}, fails=NOT_SQUARE)],
    "local_mass": [Row(near), Row(near, {"radius": 1.0}), Row(near, {"radius": 2.3, "prefix": "drop"})],
    "patch_filters": [Row(filters), Row(filters, {"components": 5})],
    "position_similarity": [Row(positions, fails=NO_TABLE, settings=("registers", "no class token", "square"))],
    "representation_similarity": [Row(layers_alike)],
    "rollout": [
        Row(rolled_out, fails=NO_WINDOWS),
        Row(rolled_out, {"head_fusion": "max", "discard_ratio": 0.5}, fails=NO_WINDOWS),
    ],
    "token_norms": [Row(norms)],
    "token_similarity": [Row(alike)],
    # Measures of these tests
    "channel_mean": [Row(channel_means)],
    "largest_weight": [Row(largest)],
    "reach_one_way": [Row(relu_of_offset), Row(relu_of_offset, {"direction": "down", "prefix": "drop"})],
    "token_length": [Row(mean_norm), Row(mean_norm, {"power": 2.0})],
    "uneven_attention": [Row(unevenness, fails=NO_WINDOWS)],
}
