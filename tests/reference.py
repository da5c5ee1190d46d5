"""Slow, literal versions of every measure, written from the papers and not from the package.

Each function works in float64 with NumPy and the standard library alone, and reads as its definition does, loops
included. Nothing here is fast and nothing here imports `vit_probe`: that is what makes agreement with it evidence.

Axes: attention is (layer, batch, head, query, key), prefix tokens first; patches run row by row (row-major).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class AttentionDistance:
    """What `mean_attention_distance` returns; distances in pixels of the model's input."""

    per_image: Array
    """(layer, batch, head): the mean over query patches, one image at a time."""
    mean: Array
    """(layer, head): the mean of `per_image` over images."""
    std: Array
    """(layer, head): the standard deviation of `per_image` over images; the population's unless `ddof` says otherwise."""
    patch_mass: Array
    """(layer, head): attention on patch keys, mean over images and query patches; never rescaled."""


@dataclass(frozen=True)
class AttentionEntropy:
    """What `attention_entropy` returns; entropies in nats."""

    mean: Array
    """(layer, head): mean over images of an image's mean over query patches."""
    std: Array
    """(layer, head): standard deviation over images of an image's mean; the population's unless `ddof` says otherwise."""
    prefix_mass: Array
    """(layer, head): attention on prefix tokens, mean over images and query patches."""
    self_mass: Array
    """(layer, head): attention of a query on itself, mean over images and query patches."""


@dataclass(frozen=True)
class AttentionOffset:
    """What `attention_offset` returns, each for every image: (layer, batch, head) and the axes named below."""

    dx: Array
    """Mean offset to the right, in pixels."""
    dy: Array
    """Mean offset downwards, in pixels."""
    aligned: Array
    """(..., row offset, col offset): mean attention by offset from the query, which lies in the centre."""


@dataclass(frozen=True)
class AttentionSinks:
    """What `attention_sinks` returns, each for every image."""

    top_patch: Array
    """(layer, batch, head): the attention of the patch that receives the most."""
    prefix: Array
    """(layer, batch, head, prefix): the attention of each prefix token."""


def softmax_attention(query: ArrayLike, key: ArrayLike, scale: float, bias: ArrayLike | None = None) -> Array:
    """Attention weights softmax(scale * q k^T + bias), over keys.

    Args:
        query: (batch, head, query, dim).
        key: (batch, head, key, dim).
        scale: What the scores are multiplied by; 1/sqrt(dim) in the paper.
        bias: Added to the scaled scores; any shape that broadcasts to (batch, head, query, key). A boolean one is a
            mask: entries that are False get no attention, as in `scaled_dot_product_attention`.

    Returns:
        (batch, head, query, key); the last axis sums to 1.

    References:
        Vaswani et al. 2017, arXiv:1706.03762, equation 1; Dosovitskiy et al. 2021, arXiv:2010.11929, equation 6.
    """
    query, key = np.asarray(query, dtype=np.float64), np.asarray(key, dtype=np.float64)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    added = np.zeros(()) if bias is None else np.asarray(bias)
    if added.dtype == np.bool_:
        added = np.where(added, 0.0, -np.inf)
    added = np.broadcast_to(added.astype(np.float64), (batch, heads, queries, keys))
    attention = np.zeros((batch, heads, queries, keys))
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                scores = np.array([scale * (query[b, h, i] @ key[b, h, j]) + added[b, h, i, j] for j in range(keys)])
                weights = np.exp(scores - scores.max())
                attention[b, h, i] = weights / weights.sum()
    return attention


def patch_centres(rows: int, cols: int, patch_height: int, patch_width: int) -> Array:
    """Centres of the patches in pixels of the model's input, row-major.

    Returns:
        (patch, 2): the vertical coordinate, then the horizontal one; the image's corner is (0, 0).

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1 (the image as a grid of patches).
    """
    return np.array([((row + 0.5) * patch_height, (col + 0.5) * patch_width) for row in range(rows) for col in range(cols)])


def mean_attention_distance(
    attention: ArrayLike,
    rows: int,
    cols: int,
    patch_size: tuple[int, int],
    num_prefix_tokens: int,
    prefix: Literal["renormalize", "drop"],
    *,
    ddof: int = 0,
) -> AttentionDistance:
    """Attention-weighted distance from each query patch to the patches, averaged over query patches.

    For one image: the mean over query patches i of sum_j a_ij * ||x_i - x_j||, j over the patches, i itself included
    (its distance is 0). Prefix tokens (class token, registers) ask no question here.

    Args:
        attention: (layer, batch, head, query, key), prefix tokens first.
        rows: Patch rows.
        cols: Patch columns.
        patch_size: Height and width of a patch in pixels.
        num_prefix_tokens: Tokens before the patches.
        prefix: "renormalize" rescales each query patch's weights on patch keys to sum to 1; "drop" leaves them as they are.
        ddof: The spread over images divides by the number of images less this: 0 is the population's standard deviation,
            1 the sample's (nan for a single image).

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5, appendix D.7, figures 7 (right) and 11;
        Raghu et al. 2021, arXiv:2108.08810, figures 1 and 3.
    """
    if prefix not in ("renormalize", "drop"):
        raise ValueError(f"prefix is 'renormalize' or 'drop', not {prefix!r}")
    attention = np.asarray(attention, dtype=np.float64)
    layers, batch, heads = attention.shape[:3]
    patches = rows * cols
    if attention.shape[3:] != (num_prefix_tokens + patches, num_prefix_tokens + patches):
        raise ValueError(f"{rows} x {cols} patches and {num_prefix_tokens} prefix tokens do not make {attention.shape[3:]}")
    centres = patch_centres(rows, cols, *patch_size).tolist()

    per_image = np.zeros((layers, batch, heads))
    mass = np.zeros((layers, batch, heads))
    for layer in range(layers):
        for image in range(batch):
            for head in range(heads):
                distances, masses = [], []
                for i in range(patches):
                    weights = attention[layer, image, head, num_prefix_tokens + i, num_prefix_tokens:].tolist()
                    total = math.fsum(weights)
                    distance = math.fsum(weights[j] * math.dist(centres[i], centres[j]) for j in range(patches))
                    distances.append(distance / total if prefix == "renormalize" else distance)
                    masses.append(total)
                per_image[layer, image, head] = math.fsum(distances) / patches
                mass[layer, image, head] = math.fsum(masses) / patches
    mean = per_image.sum(axis=1) / batch
    squares = ((per_image - mean[:, None]) ** 2).sum(axis=1)
    std = np.sqrt(squares / (batch - ddof)) if batch > ddof else np.full_like(squares, np.nan)
    return AttentionDistance(per_image=per_image, mean=mean, std=std, patch_mass=mass.sum(axis=1) / batch)


def uniform_distance(rows: int, cols: int, patch_size: tuple[int, int]) -> float:
    """Mean distance in pixels over all ordered pairs of patches: the attention distance of uniform attention.

    Pairs of a patch with itself count, as they do in `mean_attention_distance`.

    References:
        The baseline to Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (right); not drawn in the paper.
    """
    centres = patch_centres(rows, cols, *patch_size).tolist()
    return math.fsum(math.dist(a, b) for a in centres for b in centres) / len(centres) ** 2


def attention_entropy(attention: ArrayLike, num_prefix_tokens: int, *, ddof: int = 0) -> AttentionEntropy:
    """Shannon entropy of each query patch's attention to all tokens, averaged over query patches.

    For one image: the mean over query patches i of - sum_j a_ij log a_ij, j over all tokens, prefix tokens included;
    0 log 0 is 0. Prefix tokens ask no question here.

    Args:
        attention: (layer, batch, head, query, key), prefix tokens first.
        num_prefix_tokens: Tokens before the patches.
        ddof: As in `mean_attention_distance`.

    References:
        Shannon 1948, "A Mathematical Theory of Communication", section 6; Clark et al. 2019, arXiv:1906.04341,
        section 3.3 (the entropy of a head's attention).
    """
    attention = np.asarray(attention, dtype=np.float64)
    layers, batch, heads, tokens, _ = attention.shape
    patches = tokens - num_prefix_tokens
    entropy, prefix, itself = np.zeros((3, layers, batch, heads))
    for layer in range(layers):
        for image in range(batch):
            for head in range(heads):
                for i in range(num_prefix_tokens, tokens):
                    weights = attention[layer, image, head, i].tolist()
                    surprises = [-weight * math.log(weight) for weight in weights if weight > 0]
                    entropy[layer, image, head] += math.fsum(surprises) / patches
                    prefix[layer, image, head] += math.fsum(weights[:num_prefix_tokens]) / patches
                    itself[layer, image, head] += weights[i] / patches
    mean = entropy.sum(axis=1) / batch
    squares = ((entropy - mean[:, None]) ** 2).sum(axis=1)
    std = np.sqrt(squares / (batch - ddof)) if batch > ddof else np.full_like(squares, np.nan)
    return AttentionEntropy(mean=mean, std=std, prefix_mass=prefix.sum(axis=1) / batch, self_mass=itself.sum(axis=1) / batch)


def local_mass(
    attention: ArrayLike,
    rows: int,
    cols: int,
    radius: float,
    num_prefix_tokens: int,
    prefix: Literal["renormalize", "drop"],
) -> Array:
    """Share of each query patch's attention on patches at most `radius` patches away, averaged over query patches.

    Args:
        attention: (layer, batch, head, query, key), prefix tokens first.
        rows: Patch rows.
        cols: Patch columns.
        radius: In patches; the query patch itself counts.
        num_prefix_tokens: Tokens before the patches.
        prefix: "renormalize" divides by each query's attention on all patches; "drop" does not.

    Returns:
        (layer, batch, head).
    """
    attention = np.asarray(attention, dtype=np.float64)
    result = np.zeros(attention.shape[:3])
    patches = rows * cols
    for layer, image, head in np.ndindex(*attention.shape[:3]):
        for i in range(patches):
            near = total = 0.0
            for j in range(patches):
                weight = float(attention[layer, image, head, num_prefix_tokens + i, num_prefix_tokens + j])
                total += weight
                if math.sqrt((i // cols - j // cols) ** 2 + (i % cols - j % cols) ** 2) <= radius:
                    near += weight
            result[layer, image, head] += (near / total if prefix == "renormalize" else near) / patches
    return result


def attention_offset(
    attention: ArrayLike, rows: int, cols: int, patch_size: tuple[int, int], num_prefix_tokens: int
) -> AttentionOffset:
    """Mean offset from each query patch to where it attends, and the mean map of attention around the query.

    Each query patch's weights on patches are divided by their sum first.

    Args:
        attention: (layer, batch, head, query, key), prefix tokens first.
        rows: Patch rows.
        cols: Patch columns.
        patch_size: Height and width of a patch in pixels.
        num_prefix_tokens: Tokens before the patches.

    References:
        Walmer et al. 2023, arXiv:2212.03862, section 4, with mwalmer-umd/vit_analysis, analysis/attention_metrics.py.
    """
    attention = np.asarray(attention, dtype=np.float64)
    shape, patches = attention.shape[:3], rows * cols
    dx, dy = np.zeros((2, *shape))
    aligned = np.zeros((*shape, 2 * rows - 1, 2 * cols - 1))
    for place in np.ndindex(*shape):
        for row in range(rows):
            for col in range(cols):
                weights = attention[place][num_prefix_tokens + row * cols + col, num_prefix_tokens:]
                weights = weights / math.fsum(weights)
                for key_row in range(rows):
                    for key_col in range(cols):
                        share = float(weights[key_row * cols + key_col]) / patches
                        dy[place] += share * (key_row - row) * patch_size[0]
                        dx[place] += share * (key_col - col) * patch_size[1]
                        aligned[place][rows - 1 + key_row - row, cols - 1 + key_col - col] += share
    return AttentionOffset(dx=dx, dy=dy, aligned=aligned)


def attention_sinks(attention: ArrayLike, num_prefix_tokens: int) -> AttentionSinks:
    """How much of the attention of all query patches single tokens receive.

    Args:
        attention: (layer, batch, head, query, key), prefix tokens first.
        num_prefix_tokens: Tokens before the patches.

    References:
        Sun et al. 2024, arXiv:2402.17762; Darcet et al. 2024, arXiv:2309.16588.
    """
    attention = np.asarray(attention, dtype=np.float64)
    tokens = attention.shape[-1]
    top_patch = np.zeros(attention.shape[:3])
    prefix = np.zeros((*attention.shape[:3], num_prefix_tokens))
    for place in np.ndindex(*attention.shape[:3]):
        received = [
            math.fsum(attention[place][i, j] for i in range(num_prefix_tokens, tokens)) / (tokens - num_prefix_tokens)
            for j in range(tokens)
        ]
        prefix[place] = received[:num_prefix_tokens]
        top_patch[place] = max(received[num_prefix_tokens:])
    return AttentionSinks(top_patch=top_patch, prefix=prefix)


def token_similarity(tokens: ArrayLike) -> Array:
    """Mean cosine of the angle between two different patch tokens of an image, over all pairs.

    Args:
        tokens: (layer, image, patch, dim), without prefix tokens. A token of zeros has the cosine 0 to all others.

    Returns:
        (layer, image).

    References:
        Gong et al. 2021, arXiv:2104.12753, section 3, without the absolute value.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    result = np.zeros(tokens.shape[:2])
    for place in np.ndindex(*tokens.shape[:2]):
        vectors = tokens[place].tolist()
        cosines = []
        for i, one in enumerate(vectors):
            for j, other in enumerate(vectors):
                if i != j:
                    length = math.hypot(*one) * math.hypot(*other)
                    product = math.fsum(a * b for a, b in zip(one, other, strict=True))
                    cosines.append(product / length if length else 0.0)
        result[place] = math.fsum(cosines) / len(cosines)
    return result


def feature_spectrum(
    tokens: ArrayLike, rows: int, cols: int, profile: Literal["radial", "diagonal"] = "radial", *, floor: float = 1e-6
) -> Array:
    """Log amplitude of the patch tokens' two-dimensional Fourier transform, by frequency, less that of frequency 0.

    The transform is taken channel by channel, F(u, v) = sum over rows r and columns s of x(r, s) e^(-2 pi i (u r / rows +
    v s / cols)); log(|F| + `floor`) is averaged over the channels.

    Args:
        tokens: (layer, image, patch, dim), patches row by row, without prefix tokens.
        rows: Patch rows.
        cols: Patch columns.
        profile: "radial": entry k is the mean over all frequencies whose length, in waves across the shorter side, is k after
            rounding (halves to the even number), up to half the shorter side. "diagonal": entry k is the frequency (k, k) of a
            square grid.
        floor: Added to the amplitude before the logarithm.

    Returns:
        (layer, image, frequency).

    References:
        Park & Kim 2022, arXiv:2202.06709, figures 2a and 8, with xxxnell/how-do-vits-work, fourier_analysis.ipynb.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    side, dim = min(rows, cols), tokens.shape[-1]
    length = side // 2 + 1 if profile == "radial" else math.ceil(rows / 2)
    result = np.zeros((*tokens.shape[:2], length))
    for place in np.ndindex(*tokens.shape[:2]):
        rings: list[list[float]] = [[] for _ in range(length)]
        for u in range(rows):
            for v in range(cols):
                amplitude = 0.0
                for channel in range(dim):
                    total = 0j
                    for r in range(rows):
                        for s in range(cols):
                            turn = -2 * math.pi * (u * r / rows + v * s / cols)
                            total += float(tokens[place][r * cols + s, channel]) * complex(math.cos(turn), math.sin(turn))
                    amplitude += math.log(abs(total) + floor) / dim
                if profile == "diagonal":
                    ring = u if u == v else length
                else:
                    waves_down = Fraction(min(u, rows - u) * side, rows)  # frequencies beyond half the rows are negative ones
                    waves_right = Fraction(min(v, cols - v) * side, cols)
                    ring = round(math.sqrt(waves_down**2 + waves_right**2))
                if ring < length:
                    rings[ring].append(amplitude)
        profile_values = [math.fsum(ring_values) / len(ring_values) for ring_values in rings]
        result[place] = np.array(profile_values) - profile_values[0]
    return result


def unbiased_hsic(kernel: ArrayLike, other: ArrayLike) -> float:
    """The unbiased estimator of the Hilbert-Schmidt independence criterion of two kernel matrices of the same images.

    References:
        Song et al. 2012, "Feature Selection via Dependence Maximization", JMLR 13, equation 5.
    """
    k, m = np.array(kernel, dtype=np.float64), np.array(other, dtype=np.float64)
    count = len(k)
    for index in range(count):
        k[index, index] = m[index, index] = 0.0
    ones = np.ones(count)
    trace = sum(k[i, j] * m[j, i] for i in range(count) for j in range(count))
    sums = (ones @ k @ ones) * (ones @ m @ ones) / ((count - 1) * (count - 2))
    mixed = 2 / (count - 2) * (ones @ k @ m @ ones)
    return float((trace + sums - mixed) / (count * (count - 3)))


def linear_kernel(tokens: ArrayLike) -> Array:
    """Inner products of the tokens (image, patch, dim) of all pairs of images."""
    tokens = np.asarray(tokens, dtype=np.float64)
    return np.array([[sum(a @ b for a, b in zip(one, other, strict=True)) for other in tokens] for one in tokens])


def centred_kernel_alignment(layers: Sequence[ArrayLike], others: Sequence[ArrayLike], batch_sizes: Sequence[int]) -> Array:
    """Linear CKA of all pairs of layers, with HSIC averaged over batches, each weighted with its number of images.

    Args:
        layers: The tokens (image, patch, dim) of each layer.
        others: The same of the layers they are compared with.
        batch_sizes: Images per batch; batches of fewer than 4 do not count.

    Returns:
        (layer, other layer).

    References:
        Kornblith et al. 2019, arXiv:1905.00414, section 3; in mini-batches Nguyen et al. 2021, arXiv:2010.15327.
    """
    stops = np.cumsum(batch_sizes)
    batches = [slice(stop - size, stop) for stop, size in zip(stops, batch_sizes, strict=True) if size >= 4]

    def kernels(tokens: ArrayLike) -> list[Array]:
        return [linear_kernel(np.asarray(tokens)[batch]) for batch in batches]

    def hsic(one: list[Array], other: list[Array]) -> float:
        return sum(len(k) * unbiased_hsic(k, m) for k, m in zip(one, other, strict=True))

    mine, theirs = [kernels(layer) for layer in layers], [kernels(layer) for layer in others]
    return np.array([[hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b)) for b in theirs] for a in mine])


def rollout(
    attention: ArrayLike,
    head_fusion: Literal["mean", "max", "min"] = "mean",
    discard_ratio: float = 0.0,
    *,
    has_cls_token: bool,
) -> Array:
    """Attention rollout R = A_L ... A_1, where A = (F + I) / 2 with each row divided by its sum and F the fused heads.

    The paper has `head_fusion="mean"` and `discard_ratio=0`; the rest is vit-explain's idea, made exact: for each image
    and layer, the floor(discard_ratio * candidates) smallest candidates of F are set to zero before the identity is
    added. Candidates are all entries of F, except the column of the class token where there is one. Among equal
    entries the earlier one, row by row, goes first.

    Args:
        attention: (layer, batch, head, query, key), first layer first.
        head_fusion: How the heads are fused into F.
        discard_ratio: The share of candidates that is set to zero.
        has_cls_token: Whether token 0 is a class token.

    Returns:
        (batch, query, key): how much each token of the last layer's output draws from each input token.

    References:
        Abnar & Zuidema 2020, arXiv:2005.00928, section 3 and equation 1 (A = 0.5 W_att + 0.5 I; the recursion);
        Dosovitskiy et al. 2021, arXiv:2010.11929, appendix D.8 and figure 6. Fusion and discarding:
        github.com/jacobgil/vit-explain, vit_rollout.py.
    """
    if head_fusion not in ("mean", "max", "min"):
        raise ValueError(f"head_fusion is 'mean', 'max' or 'min', not {head_fusion!r}")
    attention = np.asarray(attention, dtype=np.float64)
    layers, batch, heads, tokens, _ = attention.shape
    identity = np.eye(tokens)
    result = np.zeros((batch, tokens, tokens))
    candidates = [(i, j) for i in range(tokens) for j in range(tokens) if not (has_cls_token and j == 0)]
    num_discarded = math.floor(discard_ratio * len(candidates))
    for image in range(batch):
        product = identity
        for layer in range(layers):
            fused = attention[layer, image, 0].copy()
            for head in range(1, heads):
                other = attention[layer, image, head]
                fused = {"mean": np.add, "max": np.maximum, "min": np.minimum}[head_fusion](fused, other)
            if head_fusion == "mean":
                fused = fused / heads
            smallest_first = sorted(candidates, key=lambda pair, fused=fused: fused[pair])  # type: ignore[misc]
            for pair in smallest_first[:num_discarded]:
                fused[pair] = 0.0
            mixed = 0.5 * fused + 0.5 * identity
            for i in range(tokens):
                mixed[i] = mixed[i] / mixed[i].sum()
            product = mixed @ product
        result[image] = product
    return result


def rollout_map(rollout: ArrayLike, rows: int, cols: int, num_prefix_tokens: int, has_cls_token: bool) -> Array:
    """The rollout seen from the class token, as a map over the patches; not rescaled.

    Where there is no class token, the mean over the patches' own rows.

    Args:
        rollout: (batch, query, key), as `rollout` returns it.
        rows: Patch rows.
        cols: Patch columns.
        num_prefix_tokens: Tokens before the patches.
        has_cls_token: Whether token 0 is a class token.

    Returns:
        (batch, row, col).

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, appendix D.8 and figure 6.
    """
    rollout = np.asarray(rollout, dtype=np.float64)
    patches = rows * cols
    if rollout.shape[1:] != (num_prefix_tokens + patches, num_prefix_tokens + patches):
        raise ValueError(f"{rows} x {cols} patches and {num_prefix_tokens} prefix tokens do not make {rollout.shape[1:]}")
    result = np.zeros((rollout.shape[0], rows, cols))
    for image, matrix in enumerate(rollout):
        for row in range(rows):
            for col in range(cols):
                key = num_prefix_tokens + row * cols + col
                if has_cls_token:
                    result[image, row, col] = matrix[0, key]
                else:
                    result[image, row, col] = sum(matrix[num_prefix_tokens + i, key] for i in range(patches)) / patches
    return result


def patch_filter_pca(weight: ArrayLike, components: int) -> tuple[Array, Array]:
    """Principal components of the patch-embedding filters, through the eigenvectors of their covariance.

    The dim filters are the samples, their channel * row * col weights the features; the mean filter is subtracted.
    The sign of a component is free: its entry of largest magnitude (the first of equals) is made positive.

    Args:
        weight: (dim, channel, row, col), the patch embedding's convolution.
        components: How many components, the largest variance first.

    Returns:
        The components, (component, channel, row, col), each of length 1; and the share of the total variance that
        each explains, (component,).

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and figure 7 (left).
    """
    weight = np.asarray(weight, dtype=np.float64)
    samples = weight.reshape(weight.shape[0], -1)
    centred = samples - samples.mean(axis=0)
    covariance = centred.T @ centred / (samples.shape[0] - 1)
    variances, vectors = np.linalg.eigh(covariance)
    order = np.argsort(variances)[::-1][:components]
    found = []
    for index in order:
        vector = vectors[:, index]
        largest = vector[np.argmax(np.abs(vector))]
        found.append((vector if largest > 0 else -vector).reshape(weight.shape[1:]))
    return np.stack(found), variances[order] / np.trace(covariance)


def position_similarity(table: ArrayLike, rows: int, cols: int) -> Array:
    """Cosine similarity of each patch's position embedding with every other patch's.

    Args:
        table: (patch, dim), row-major, without the entries of prefix tokens.
        rows: Patch rows.
        cols: Patch columns.

    Returns:
        (row, col, row, col).

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5, appendix D.4, figures 7 (centre) and 10.
    """
    table = np.asarray(table, dtype=np.float64)
    if table.shape[0] != rows * cols:
        raise ValueError(f"a table of {table.shape[0]} positions is not {rows} x {cols}")
    norms = [math.sqrt(math.fsum(vector * vector)) for vector in table]
    similarity = np.zeros((rows, cols, rows, cols))
    for row in range(rows):
        for col in range(cols):
            for other_row in range(rows):
                for other_col in range(cols):
                    a, b = row * cols + col, other_row * cols + other_col
                    similarity[row, col, other_row, other_col] = (table[a] @ table[b]) / (norms[a] * norms[b])
    return similarity


def sincos_2d(rows: int, cols: int, dim: int) -> Array:
    """The fixed 2-D sine-cosine position embedding, in the order of MAE.

    With q = dim / 4 and omega_i = 10000^(-i / q), i = 0 ... q - 1, the channels are, in this order:
    sin(col * omega), cos(col * omega), sin(row * omega), cos(row * omega). The first half is thus the COLUMN, although
    MAE's code calls it `emb_h`: its `np.meshgrid(grid_w, grid_h)` puts the column index first. MoCo v3 prints the same
    four blocks, but its `torch.meshgrid(grid_w, grid_h)` indexes "ij", so that its first half is in effect the ROW.
    big_vision has MAE's order with omega_i = 10000^(-i / (q - 1)).

    Args:
        rows: Patch rows.
        cols: Patch columns.
        dim: Channels, a multiple of 4.

    Returns:
        (patch, dim), row-major; coordinates count patches from 0.

    References:
        He et al. 2022, arXiv:2111.06377, appendix A.1, with facebookresearch/mae, util/pos_embed.py;
        Chen et al. 2021, arXiv:2104.02057, with facebookresearch/moco-v3, vits.py;
        Vaswani et al. 2017, arXiv:1706.03762, section 3.5 (the 1-D form).
    """
    if dim % 4:
        raise ValueError(f"dim is a multiple of 4, not {dim}")
    quarter = dim // 4
    table = np.zeros((rows * cols, dim))
    for row in range(rows):
        for col in range(cols):
            for i in range(quarter):
                omega = 10000.0 ** (-i / quarter)
                vector = table[row * cols + col]
                vector[i] = math.sin(col * omega)
                vector[quarter + i] = math.cos(col * omega)
                vector[2 * quarter + i] = math.sin(row * omega)
                vector[3 * quarter + i] = math.cos(row * omega)
    return table


def bicubic_resize(
    table: ArrayLike, new_rows: int, new_cols: int, *, antialias: bool = False, align_corners: bool = False
) -> Array:
    """Cubic-convolution resizing of a grid of vectors, as `torch.nn.functional.interpolate(mode="bicubic")` defines it.

    Plain: four taps a direction, a = -0.75, pixel centres at half-integers (or corners on corners with
    `align_corners`); taps beyond the border repeat the border. `antialias`: a = -0.5, half-integer centres, the kernel
    widened by the scale where the grid shrinks; taps beyond the border are left out and the rest rescaled to sum to 1.

    Args:
        table: (row, col, dim).
        new_rows: Rows wanted.
        new_cols: Columns wanted.
        antialias: As timm resizes position embeddings; without it, as transformers does.
        align_corners: Corner points keep their values. Not together with `antialias`.

    Returns:
        (new_rows, new_cols, dim).

    References:
        Keys 1981, "Cubic convolution interpolation for digital image processing", IEEE TASSP 29(6).
    """
    if antialias and align_corners:
        raise ValueError("antialias is defined here for half-integer centres only: drop align_corners")
    table = np.asarray(table, dtype=np.float64)
    rows, cols, dim = table.shape
    down = _resize_weights(rows, new_rows, antialias, align_corners)
    across = _resize_weights(cols, new_cols, antialias, align_corners)
    resized = np.zeros((new_rows, new_cols, dim))
    for new_row in range(new_rows):
        for new_col in range(new_cols):
            for row in range(rows):
                for col in range(cols):
                    resized[new_row, new_col] += down[new_row, row] * across[new_col, col] * table[row, col]
    return resized


def _cubic_kernel(x: float, a: float) -> float:
    """Keys' cubic convolution kernel with the free parameter a; it vanishes from |x| = 2 on."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def _resize_weights(size: int, new_size: int, antialias: bool, align_corners: bool) -> Array:
    """The (new_size, size) matrix that resizes one axis."""
    weights = np.zeros((new_size, size))
    for new in range(new_size):
        if antialias:
            centre, widening = (new + 0.5) * size / new_size - 0.5, max(size / new_size, 1.0)
            for tap in range(size):
                weights[new, tap] = _cubic_kernel((tap - centre) / widening, a=-0.5)
            weights[new] /= weights[new].sum()
            continue
        if align_corners:
            centre = new * (size - 1) / (new_size - 1) if new_size > 1 else 0.0
        else:
            centre = (new + 0.5) * size / new_size - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[new, min(max(tap, 0), size - 1)] += _cubic_kernel(tap - centre, a=-0.75)
    return weights
