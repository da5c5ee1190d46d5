"""Receptive field: the part of the image that a unit of a convolutional network sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from vit_probe.errors import InputError
from vit_probe.results import Result, software_versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ARCHITECTURES", "ReceptiveFieldResult", "SlidingLayer", "plain_stack", "receptive_field"]


@dataclass(frozen=True)
class SlidingLayer:
    """A layer that slides a square window over its input: a convolution, or a pooling.

    Args:
        name: Name in tables.
        kernel: Side of the window.
        stride: Step from one window to the next, in positions of the input.
        dilation: Step from one position of the window to the next, in positions of the input.
        pooling: Whether it is a pooling, which does not count as a convolution in the depth of a network.

    Raises:
        InputError: If kernel, stride or dilation is not a whole number of at least 1.

    Examples:
        >>> SlidingLayer("conv1", 7, stride=2).dilation
        1
    """

    name: str
    kernel: int
    stride: int = 1
    dilation: int = 1
    pooling: bool = False

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("kernel", "stride", "dilation")}
        if wrong := [f"{name} {value!r}" for name, value in sizes.items() if not isinstance(value, int) or value < 1]:
            raise InputError(f"layer {self.name!r} has {' and '.join(wrong)}; each must be a whole number of at least 1")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ReceptiveFieldResult(Result):
    """Receptive fields of the units of each layer of a network, far from the image's border.

    Args:
        network: Name of the network.
        names: Names of the layers, from the image on.
        depth: (layer), number of convolutions up to and including this layer; poolings do not count.
        receptive_field: (layer), width of the field along an axis in pixels, from the first to the last that a unit sees.
        stride: (layer), pixels from one unit to the next.
        mean_distance: (layer), mean distance in pixels from the centre of the field to the pixels that a unit sees, if all
            kernels are uniform.
    """

    measure: str = "receptive_field"
    network: str
    names: Annotated[list[str], "layer"]
    depth: Int[np.ndarray, "layer"]
    receptive_field: Int[np.ndarray, "layer"]
    stride: Int[np.ndarray, "layer"]
    mean_distance: Float[np.ndarray, "layer"]

    @property
    def reach(self) -> Float[np.ndarray, "layer"]:
        """(layer), pixels from the centre of the field to the centre of the last pixel on each side.

        The pixels in the corners, the farthest that a unit sees, lie sqrt(2) times as far away.
        """
        return (self.receptive_field - 1) / 2

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer: network, layer, name, depth, receptive_field, reach, stride, mean_distance.

        The depth is in convolutions, the last four columns are in pixels.
        """
        return pd.DataFrame(
            {
                "network": self.network,
                "layer": np.arange(len(self.names)),
                "name": self.names,
                "depth": self.depth,
                "receptive_field": self.receptive_field,
                "reach": self.reach,
                "stride": self.stride,
                "mean_distance": self.mean_distance,
            }
        )

    def summary(self) -> pd.DataFrame:
        """One row per stride, for the last layer that has it."""
        columns = {"name": "layer", "receptive_field": "receptive field (px)", "reach": "to each side", "stride": "stride"}
        last = self.to_dataframe().groupby("stride").tail(1)
        return last[list(columns)].rename(columns=columns).reset_index(drop=True)

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw half the receptive field against depth."""
        from vit_probe.plots.receptive_field import plot_receptive_field

        return plot_receptive_field(self.to_dataframe(), ax=ax)


def receptive_field(layers: Sequence[SlidingLayer], *, network: str = "network") -> ReceptiveFieldResult:
    """Compute how many pixels a unit of each layer sees along one axis of the image.

    With kernel k, stride s and dilation d of layer l, the receptive field is r_l = r_(l-1) + (k_l - 1) d_l j_(l-1) pixels wide,
    and neighbouring units are j_l = j_(l-1) s_l pixels apart, starting from r_0 = j_0 = 1. If windows leave gaps (dilation, or
    a kernel smaller than its stride), a unit does not see all pixels between the first and the last. Padding has no effect far
    from the border, and layers that act on single positions (normalisation, activation) have none at all. If a network
    branches, `layers` must be those of the path with the widest field, to which the other branches add no pixel.

    A receptive field is everything that a unit can see, but most of the effect comes from less. `mean_distance` measures this
    in the same way as attention distance does for a head: it is the mean distance of pixels from the centre of the field,
    weighted by the unit's gradient in a network with uniform kernels, average pooling and no activations. These weights
    approach a normal distribution, whose width grows only with the square root of depth.

    Args:
        layers: The layers, from the image on.
        network: Name of the network in tables and figures.

    Raises:
        InputError: If there are no layers.

    Examples:
        >>> receptive_field(plain_stack(3)).receptive_field.tolist()
        [3, 5, 7]

    References:
        Araujo, Norris & Sim 2019, Computing Receptive Fields of Convolutional Neural Networks, Distill,
        doi:10.23915/distill.00021, for the receptive field;
        Luo et al. 2016, arXiv:1701.04128, section 2, for the weights with uniform kernels.
    """
    if not layers:
        raise InputError("there are no layers; pass at least one SlidingLayer(name, kernel, stride)")
    width, stride, depth, weights = 1, 1, 0, np.ones(1)
    rows = []
    for layer in layers:
        window = np.zeros((layer.kernel - 1) * layer.dilation * stride + 1)
        window[:: layer.dilation * stride] = 1 / layer.kernel
        weights = np.convolve(weights, window)
        width += (layer.kernel - 1) * layer.dilation * stride
        stride *= layer.stride
        depth += not layer.pooling
        rows.append((depth, width, stride, _mean_distance(weights)))
    depths, widths, strides, distances = zip(*rows, strict=True)
    provenance: dict[str, Any] = {
        "options": {"network": network, "layers": [asdict(layer) for layer in layers]},
        "versions": software_versions(),
    }
    return ReceptiveFieldResult(
        network=network,
        names=[layer.name for layer in layers],
        depth=np.array(depths),
        receptive_field=np.array(widths),
        stride=np.array(strides),
        mean_distance=np.array(distances),
        provenance=provenance,
    )


def _mean_distance(weights: Float[np.ndarray, "pixel"]) -> float:
    """Mean distance of pixels from the centre, if the weight of a pixel is the product of those of its row and its column."""
    places = np.arange(len(weights)) - (len(weights) - 1) / 2
    return float(weights @ np.hypot(places[:, None], places[None, :]) @ weights)


def plain_stack(depth: int, kernel: int = 3) -> tuple[SlidingLayer, ...]:
    """A stack of `depth` convolutions of one size, without stride or pooling.

    Its receptive field is 1 + depth (kernel - 1) pixels wide.

    Examples:
        >>> [layer.name for layer in plain_stack(2)]
        ['conv1', 'conv2']
    """
    return tuple(SlidingLayer(f"conv{index + 1}", kernel) for index in range(depth))


def _alexnet() -> tuple[SlidingLayer, ...]:
    return (
        SlidingLayer("conv1", 11, 4),
        SlidingLayer("pool1", 3, 2, pooling=True),
        SlidingLayer("conv2", 5),
        SlidingLayer("pool2", 3, 2, pooling=True),
        *(SlidingLayer(f"conv{index}", 3) for index in (3, 4, 5)),
        SlidingLayer("pool5", 3, 2, pooling=True),
    )


def _vgg16() -> tuple[SlidingLayer, ...]:
    layers: list[SlidingLayer] = []
    for stage, convolutions in enumerate((2, 2, 3, 3, 3), start=1):
        layers += [SlidingLayer(f"conv{stage}_{index + 1}", 3) for index in range(convolutions)]
        layers.append(SlidingLayer(f"pool{stage}", 2, 2, pooling=True))
    return tuple(layers)


def _resnet50(halving: Literal[1, 3]) -> tuple[SlidingLayer, ...]:
    """All residual branches in sequence; the convolution with kernel size `halving` halves the resolution of a stage."""
    layers = [SlidingLayer("conv1", 7, 2), SlidingLayer("pool1", 3, 2, pooling=True)]
    for stage, blocks in enumerate((3, 4, 6, 3), start=2):
        for block in range(1, blocks + 1):
            stride = 2 if block == 1 and stage > 2 else 1
            layers += [
                SlidingLayer(f"conv{stage}_{block} 1x1", 1, stride if halving == 1 else 1),
                SlidingLayer(f"conv{stage}_{block} 3x3", 3, stride if halving == 3 else 1),
                SlidingLayer(f"conv{stage}_{block} 1x1 out", 1),
            ]
    return tuple(layers)


ARCHITECTURES: Mapping[str, tuple[SlidingLayer, ...]] = MappingProxyType(
    {"AlexNet": _alexnet(), "VGG-16": _vgg16(), "ResNet-50": _resnet50(3), "ResNet-50 v1": _resnet50(1)}
)
"""Convolutions and poolings of known networks, on the widest path from the image to the last feature map. What follows, a
global pooling or the classifier, sees the whole image.

AlexNet: Krizhevsky, Sutskever & Hinton 2012; torchvision's version, from arXiv:1404.5997, has the same kernels and strides.
VGG-16: Simonyan & Zisserman 2014, arXiv:1409.1556, configuration D. ResNet-50: He et al. 2015, arXiv:1512.03385, table 1, the
path through all residual branches (shortcuts see less). In the first block of a stage, the 3 x 3 convolution halves the
resolution, as in torchvision ("v1.5") and in the hybrids of the ViT paper; in "ResNet-50 v1", the version whose weights were
published, the first 1 x 1 convolution does.
"""
