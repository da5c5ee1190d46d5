"""Where tokens lie behind a stem that mixes neighbouring patches: the footprint of a token on the image.

Behind a plain patch embedding, a token shows one cell of the grid and nothing else. Behind overlapping patches or several
convolutions it shows a bit of its neighbours, too. So this module asks how much of a token comes from each cell.

1. *Gains.* Some images show the same noise plus a small change: more noise, which in each cell of the claimed grid is
   multiplied by a random number, the cell's gain. Its gains in all the images tell a cell from any other.
2. *Gram matrix.* The change is so small that the model is linear in it. A token's query then changes by a sum over the cells,
   gain times response. The inner products of these changes from image to image are about a sum over the cells of
   share * gain * gain', where the share is how much of the token comes from the cell. This is true in any layer, whatever
   normalisation, MLPs and position embeddings do to the queries.
3. *Footprint.* A convolution treats all places alike, so the shares depend on how far a cell is from the token: one footprint
   serves all tokens. It is a box with soft edges. Its width and its centre (convolutions of stride 2 are off by up to half a
   cell) are fitted by maximum likelihood, with the tokens where the grid claims them.
4. *Decoding.* With that footprint, a token's Gram matrix has a likelihood at each place of the grid. Tokens lie where they are
   claimed if each is likelier there than at any place farther away than a cell, and any two neighbours likelier than exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from vit_probe.tokens.grid import TokenGrid
from vit_probe.tokens.identity_attention import IdentityAttentionProbe

__all__ = ["CellResponses", "agrees_with_grid", "distinct_gains", "find_places", "mixing_gains", "show_own_cells"]

_NUM_GAINS = 11  # images: with those that show that patches are mixed, 15 in all
_CHANGE = 1e-3  # of the noise: small enough for a model to be linear in it, large enough for float32
_CHANGE_OF_SINGLE = 3e-3  # single cells need less exact changes than mixtures, and trained models of more tokens larger ones
_ROUNDING = 1e-3  # a change this much smaller than the mean of all is rounding
# Share of a token's change that its cell explains: more than 0.9998 in all models tried, 0.9985 in a trained one.
_PURE = 0.98
_ALIKE = 0.999  # cells that explain so nearly the same share cannot be told apart: of 1,369 cells none, of 16,384 six each
_NUM_FITTED = 64  # tokens to which a footprint is fitted
_MAX_OFFSET = 0.65  # cells: half a cell, and the error of the fit
_MAX_DRIFT = 0.3  # cells
_MIN_DRIFTING = 4  # cells along an axis: on fewer, a drift cannot be told from exchanged tokens
_REACH = 2  # cells: how near each other the gains of two must be nearly orthogonal
# How much likelier than with two neighbours exchanged the claimed order must be (a log-likelihood ratio). Where tokens lie as
# claimed, it is usually 5 to 100; with exchanged neighbours it is negative; and about 0 where nothing tells them apart.
_MIN_EVIDENCE = 2.0
_PRIOR_SCALES = torch.tensor([2.0, 2.0, 0.4, 0.4, 4.0, 4.0, 4.0, 4.0, 4.0], dtype=torch.float64)
_NUM_ROUNDS = 3  # of placing tokens and fitting their footprint in turn


class CellResponses:
    """How the queries and keys of a model change with the cells of a grid.

    Args:
        probe: The model.
        grid: The claimed grid.
        gains: Of each cell in each image, relative to the noise that is shown.
        last: The last layer to see.
        follow: See `IdentityAttentionProbe.small_changes`.

    Attributes:
        products: Products of each cell's gains in every two images.
        footprints: Those of queries and of keys in the layer that was judged last.
        gram: Inner products of the changes of each token's query (and key) in every two images, by layer.
    """

    def __init__(
        self,
        probe: IdentityAttentionProbe,
        grid: TokenGrid,
        gains: Float[Tensor, "image row col"],
        last: int,
        *,
        follow: bool = False,
    ) -> None:
        self.footprints: list[Footprint] = []
        self.products: Float[Tensor, "row col image image"] = (
            torch.einsum("irc,jrc->rcij", gains, gains) / gains.square().mean()
        )
        changes = probe.small_changes([probe.pixels_of(gain, grid) for gain in gains], last, follow=follow)
        self.gram: dict[int, Float[Tensor, "part window token image image"]] = {
            layer: _gram(torch.stack(of_layer, dim=-2)) for layer, of_layer in changes.items()
        }

    def merged_products(self, merges: int) -> Float[Tensor, "row col image image"]:
        """Return `products` for cells that were merged two by two."""
        rows, cols = self.products.shape[:2]
        factor = 2**merges
        padded = F.pad(self.products, (0, 0, 0, 0, 0, -cols % factor, 0, -rows % factor))
        return padded.unflatten(1, (-1, factor)).unflatten(0, (-1, factor)).mean(dim=(1, 3))


@dataclass(frozen=True)
class Footprint:
    """The share of each cell in a token, by the cell's distance from the token's place.

    Along each axis it is a box with soft edges; all lengths are in cells.

    Args:
        offset: How far its centre is from the token's place, down and to the right.
        drift: How much farther at the bottom and at the right edge of the image, because of a wrong patch size.
        half_width: Half the height and the width of the box.
        softness: How soft its edges are.
        background: Share of what comes from everywhere.
    """

    offset: Float[Tensor, "2"]
    drift: Float[Tensor, "2"]
    half_width: Float[Tensor, "2"]
    softness: Float[Tensor, "2"]
    background: Float[Tensor, ""]

    @classmethod
    def from_parameters(cls, parameters: Float[Tensor, "9"]) -> Footprint:
        """Make a footprint of unbounded numbers; zeros stand for a box of a cell and a half."""
        offset, drift, half_width, softness, background = parameters.split([2, 2, 2, 2, 1])
        return cls(
            0.75 * torch.tanh(offset),
            drift,
            0.1 + 0.7 * half_width.exp(),
            0.03 + 0.15 * softness.exp(),
            1e-4 + 0.01 * background[0].exp(),
        )

    @classmethod
    def fit(
        cls,
        products: Float[Tensor, "row col image image"],
        gram: Float[Tensor, "token image image"],
        places: Int[Tensor, "token"],
    ) -> Footprint:
        """Return the footprint that is likeliest if these tokens lie at these places."""
        chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:_NUM_FITTED]
        with torch.inference_mode(False), torch.enable_grad():
            products, gram, places = products.clone(), gram[chosen].clone(), places[chosen].clone()
            parameters = torch.zeros(9, dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.LBFGS([parameters], max_iter=25, line_search_fn="strong_wolfe")

            def loss() -> Tensor:
                optimizer.zero_grad()
                footprint = cls.from_parameters(parameters)
                covariance = footprint.covariance(products)[places]
                likelihood = _scaled_log_likelihood(covariance, (torch.linalg.inv(covariance) * gram).sum(dim=(-1, -2))).sum()
                # Few tokens do not determine all the numbers: prefer a centred footprint of ordinary width, without drift.
                value = -likelihood + (parameters / _PRIOR_SCALES).square().sum()
                value.backward()
                return value

            optimizer.step(loss)
            return cls.from_parameters(parameters.detach())

    @property
    def is_centred(self) -> bool:
        """Whether tokens lie within half a cell of where they are claimed, all over the image."""
        return bool((self.offset.abs() <= _MAX_OFFSET).all() and (self.drift.abs() <= _MAX_DRIFT).all())

    def covariance(self, products: Float[Tensor, "row col image image"]) -> Float[Tensor, "place image image"]:
        """Return what the Gram matrix of a token is expected to be at each place of the grid, but for a factor."""
        down, right = (self._shares(axis, count) for axis, count in enumerate(products.shape[:2]))
        in_rows = torch.tensordot(down, products, dims=1)
        expected = torch.einsum("qc,pcij->pqij", right, in_rows).flatten(0, 1)
        return expected + self.background * torch.eye(expected.shape[-1], dtype=expected.dtype)

    def log_likelihood(
        self, products: Float[Tensor, "row col image image"], gram: Float[Tensor, "token image image"]
    ) -> Float[Tensor, "token place"]:
        """Return how likely each token's Gram matrix is at each place of the grid."""
        covariance = self.covariance(products)
        return _scaled_log_likelihood(covariance, gram.flatten(1) @ torch.linalg.inv(covariance).flatten(1).T)

    def _shares(self, axis: int, count: int) -> Float[Tensor, "place cell"]:
        """Return the share of each row (or column) of cells in tokens of each row (or column)."""
        place = torch.arange(count, dtype=torch.float64)
        centre = place + 0.5 + self.offset[axis]
        if count >= _MIN_DRIFTING:
            centre = centre + self.drift[axis] * (2 * place / (count - 1) - 1)
        half, soft = self.half_width[axis], self.softness[axis]
        edges = torch.arange(count + 1, dtype=torch.float64) - centre[:, None]
        # The box is sigmoid((x + half) / soft) - sigmoid((x - half) / soft); this is its integral.
        below = soft * (F.softplus((edges + half) / soft) - F.softplus((edges - half) / soft)) / (2 * half)
        return below.diff(dim=1)


def show_own_cells(responses: CellResponses, layer: int, tokens: slice) -> Bool[Tensor, "part token"] | None:
    """Return which tokens' queries, and which keys, show the cell in which they are claimed to lie.

    Returns None if some show parts of several cells. Else the change from image to image is a cell's gains times one vector,
    and the Gram matrix has rank 1. Keys that do not change contradict nothing.

    Args:
        responses: To `distinct_gains`.
        layer: Number of a layer over all tokens.
        tokens: Which tokens are patches.
    """
    gram = responses.gram[layer][:, 0, tokens]
    total = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    changes = total > 0.5 * gram.shape[-1]
    # Gains are vectors of one length, so the share of a change that a cell explains is largest for the right one.
    shares = gram.flatten(2) @ responses.products.flatten(0, 1).flatten(1).T / gram.shape[-1]
    largest, own = shares.amax(dim=-1), shares.diagonal(dim1=-2, dim2=-1)
    return ~changes | (own >= _ALIKE * largest) if bool((largest >= _PURE * total)[changes].all()) else None


def agrees_with_grid(responses: CellResponses, layer: int, tokens: slice) -> bool:
    """Return whether the tokens of a layer lie row by row, judging by their queries and by their keys."""
    products = responses.products
    shape = products.shape[:2]
    places = torch.arange(shape[0] * shape[1])
    parts = responses.gram[layer][:, 0, tokens]

    def agree(footprints: Sequence[Footprint]) -> bool:
        likelihoods = [footprint.log_likelihood(products, gram) for footprint, gram in zip(footprints, parts, strict=True)]
        return all(footprint.is_centred for footprint in footprints) and _lie_at(places, likelihoods, shape)

    # Fitting takes longer than running the model. Where nothing is mixed between layers, they share the stem's footprint.
    if responses.footprints and agree(responses.footprints):
        return True
    responses.footprints = [Footprint.fit(products, gram, places) for gram in parts]
    return agree(responses.footprints)


def find_places(
    responses: CellResponses, layer: int, is_patch: Bool[Tensor, "window token"], merges: int
) -> Int[Tensor, "window token"] | None:
    """Return the place of each token of a layer with windows, counted row by row; None if it cannot be told.

    Args:
        responses: Of the model.
        layer: Number of the layer.
        is_patch: Which tokens have a place; the others get -1.
        merges: How often cells were merged two by two before the layer.
    """
    products = responses.merged_products(merges)
    queries, keys = responses.gram[layer][:, is_patch]
    footprint = Footprint.from_parameters(torch.zeros(9, dtype=torch.float64))
    for _ in range(_NUM_ROUNDS):
        _, places = (torch.from_numpy(i) for i in linear_sum_assignment(-footprint.log_likelihood(products, queries).numpy()))
        footprint = Footprint.fit(products, queries, places)
    likelihoods = [footprint.log_likelihood(products, gram) for gram in (queries, keys)]
    if not (footprint.is_centred and _lie_at(places, likelihoods, products.shape[:2])):
        return None
    return torch.full(is_patch.shape, -1).masked_scatter(is_patch, places)


def _lie_at(places: Int[Tensor, "token"], likelihoods: Sequence[Float[Tensor, "token place"]], shape: tuple[int, ...]) -> bool:
    """Return whether tokens lie at their places, judging by the log-likelihoods of their queries and of their keys.

    For neither may a place more than a cell away be likelier than a token's own. And together they must tell neighbours apart:
    no two may as well be exchanged.
    """
    rows, cols = shape
    cell = torch.arange(rows * cols)
    row, col = cell // cols, cell % cols
    distance = torch.maximum((row[places, None] - row).abs(), (col[places, None] - col).abs())
    advantages = [likelihood - likelihood.gather(1, places[:, None]) for likelihood in likelihoods]  # over a token's own place
    if any((advantage[distance > 1] >= 0).any() for advantage in advantages):
        return False
    moved = torch.stack(advantages).sum(dim=0)[:, places]  # by token, and by the token whose place it would take
    return not bool(((moved + moved.T)[distance[:, places] == 1] > -_MIN_EVIDENCE).any())


def distinct_gains(rows: int, cols: int) -> Float[Tensor, "3 row col"]:
    """Return gains in three images that tell single cells apart: as unit vectors they are spread evenly over half a sphere.

    A golden spiral spreads them so that no two of N are closer than about the square root of 2 pi / N.
    """
    number = torch.arange(rows * cols, dtype=torch.float64)
    height = (number + 0.5) / len(number)
    angle = number * (torch.pi * (3 - 5**0.5))
    radius = (1 - height.square()).sqrt()
    spiral = torch.stack([radius * angle.cos(), radius * angle.sin(), height])
    # Along the spiral, cells that follow each other would be near; shuffled, mixtures of neighbours look like no cell.
    order = torch.randperm(len(number), generator=torch.Generator().manual_seed(0))
    return _CHANGE_OF_SINGLE * spiral[:, order].unflatten(1, (rows, cols))


def mixing_gains(rows: int, cols: int) -> Float[Tensor, "image row col"]:
    """Return random gains of one mean square, those of cells near each other nearly orthogonal.

    A token mixes cells near each other, and these must be told apart with few images.
    """
    generator = torch.Generator().manual_seed(0)
    gains = torch.randn(_NUM_GAINS, rows, cols, generator=generator, dtype=torch.float64)
    steps = [(down, right) for down in range(_REACH + 1) for right in range(-_REACH, _REACH + 1) if (down, right) > (0, 0)]
    for _ in range(40):
        gains = gains / gains.norm(dim=0)
        change = torch.zeros_like(gains)
        for down, right in steps:
            # The cells that have a neighbour in this direction, and these neighbours.
            here = (slice(None), slice(0, max(rows - down, 0)), slice(max(-right, 0), max(cols - max(right, 0), 0)))
            there = (slice(None), slice(down, None), slice(max(right, 0), max(cols + min(right, 0), 0)))
            overlap = (gains[here] * gains[there]).sum(dim=0) / max(down, abs(right))
            change[here] += overlap * gains[there]
            change[there] += overlap * gains[here]
        gains = gains - 0.1 * change
    return _CHANGE * gains / gains.square().mean(dim=0).sqrt()


def _gram(changes: Float[Tensor, "window token image 2*dim"]) -> Float[Tensor, "part window token image image"]:
    """Return the inner products of changes of queries, and those of keys, scaled to a mean square of 1.

    Those of tokens that change far less than others, by rounding alone, stay small.
    """
    parts = torch.stack(changes.chunk(2, dim=-1))
    products = parts @ parts.mT
    size = products.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    smallest = (_ROUNDING**2 * size.mean(dim=(1, 2), keepdim=True)).clamp_min(1e-300)
    return products / torch.maximum(size, smallest)[..., None, None]


def _scaled_log_likelihood(
    covariance: Float[Tensor, "*place image image"], distance: Float[Tensor, "*token place"]
) -> Float[Tensor, "*token place"]:
    """Return the log-likelihood of Gaussian changes whose covariance is known but for its scale.

    Args:
        covariance: Between images.
        distance: trace(covariance^-1 gram).
    """
    images = covariance.shape[-1]
    return -0.5 * (torch.linalg.slogdet(covariance)[1] + images * distance.clamp_min(1e-300).log())
