"""The methods: several ways of doing the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks import ours, peers
from benchmarks.cases import Case
from benchmarks.runs import Prepare

__all__ = ["METHODS", "Method", "with_floors"]


@dataclass(frozen=True)
class Method:
    """A way of doing the work.

    Args:
        name: Name for `--method` and the tables.
        floor: Name of the plain forward pass of the same library's model.
        prepare: Loads the model and returns the function that is timed.
        note: Remark for the table.
        held: Number of float32 arrays of token x token numbers that each image of a batch takes, in addition to the model.
        rollout: Whether it computes the rollout.
    """

    name: str
    floor: str
    prepare: Prepare
    note: str
    held: Callable[[Case], int] = lambda case: 0
    rollout: bool = False

    def needed_bytes(self, case: Case) -> int:
        """Estimated memory of the attention maps."""
        return self.held(case) * min(case.batch_size, case.images) * case.num_tokens**2 * 4


def with_floors(names: Iterable[str]) -> list[str]:
    """The methods called `names`, preceded by the floors that they are compared with."""
    names = list(names)
    return list(dict.fromkeys([*(METHODS[name].floor for name in names), *names]))


def _all_layers(case: Case) -> int:
    return case.num_heads * (case.depth + 2)  # one layer is being computed


def _one_layer(case: Case) -> int:
    return case.num_heads * 2


def _head_means(case: Case) -> int:
    return _one_layer(case) + case.depth


def _rollout_maps(case: Case) -> int:
    return case.depth + 2 if case.num_tokens <= 4 * case.embed_dim else 0  # see vit_probe.measures.rollout_algorithms


_STOPS = "ends after the last layer's attention"
_ALL = "holds the maps of all layers"
_ROW = "computes the class token's row only"
_EAGER = peers.transformers_eager
_LIST = (
    Method("fused", "fused", peers.plain("own"), "plain forward pass of VisionTransformer"),
    Method("timm-fused", "timm-fused", peers.plain("timm_fused"), "plain forward pass of timm's model"),
    Method(
        "transformers-sdpa", "transformers-sdpa", peers.plain("transformers_sdpa"), "plain forward pass of transformers' model"
    ),
    Method("vit-probe-distance", "fused", ours.observed("distance"), _STOPS),
    Method("vit-probe-distance-full", "fused", ours.observed("distance", stop=False), "also returns the model's output"),
    Method("vit-probe-rollout", "fused", ours.observed("rollout"), _STOPS, _rollout_maps, rollout=True),
    Method(
        "vit-probe-all",
        "fused",
        ours.observed("distance", "rollout", "entropy"),
        f"distance, rollout and entropy in one pass; {_STOPS}",
        _rollout_maps,
        rollout=True,
    ),
    Method(
        "vit-probe-call",
        "fused",
        ours.call,
        "mean_attention_distance(model, images): also locates the tokens and hashes images and weights",
    ),
    Method("transformers-distance", "transformers-sdpa", peers.from_maps(_EAGER, "distance"), _ALL, _all_layers),
    Method(
        "transformers-keras",
        "transformers-sdpa",
        peers.from_maps(_EAGER, "distance-dropped"),
        f"{_ALL}; the formula of Keras' probing ViTs in NumPy, not rescaled",
        _all_layers,
    ),
    Method(
        "transformers-rollout",
        "transformers-sdpa",
        peers.from_maps(_EAGER, "rollout"),
        f"{_ALL}; {_ROW}",
        _all_layers,
        rollout=True,
    ),
    Method(
        "timm-hooks-distance",
        "timm-fused",
        peers.from_maps(peers.timm_hooks, "distance"),
        "unfused; holds the map of one layer, reduced in the hook",
        _one_layer,
    ),
    Method(
        "timm-hooks-rollout",
        "timm-fused",
        peers.from_maps(peers.timm_hooks, "rollout"),
        f"unfused; holds each layer's mean over heads; {_ROW}",
        _head_means,
        rollout=True,
    ),
    Method(
        "timm-extract-distance",
        "timm-fused",
        peers.from_maps(peers.timm_extract, "distance"),
        f"AttentionExtract on the unfused model; {_ALL}; {_STOPS}",
        _all_layers,
    ),
)
METHODS = {method.name: method for method in _LIST}
