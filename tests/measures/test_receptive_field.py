"""Receptive fields: literal propagation of intervals, and the pixels that real convolutions depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vit_probe import InputError, load_result
from vit_probe.measures.receptive_field import ARCHITECTURES, ReceptiveFieldResult, SlidingLayer, plain_stack, receptive_field

LAYERS = st.lists(
    st.builds(
        lambda kernel, stride, dilation: SlidingLayer("layer", kernel, stride, dilation),
        st.integers(1, 5),
        st.integers(1, 3),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=4,
)
MIXED = (SlidingLayer("a", 5, 2), SlidingLayer("b", 2, 2, pooling=True), SlidingLayer("c", 3, 1, 2), SlidingLayer("d", 1, 3))


def pixels_seen(layers: Sequence[SlidingLayer], unit: int) -> dict[int, float]:
    """Every pixel that a unit of the last layer sees along an axis, with its weight under uniform kernels, path by path."""
    seen = {unit: 1.0}
    for layer in reversed(layers):
        before: dict[int, float] = {}
        for place, weight in seen.items():
            for tap in range(layer.kernel):
                pixel = place * layer.stride + tap * layer.dilation
                before[pixel] = before.get(pixel, 0.0) + weight / layer.kernel
        seen = before
    return seen


def literal(layers: Sequence[SlidingLayer]) -> tuple[int, int, float]:
    """Receptive field, stride and mean distance of the last layer, in loops."""
    seen, neighbour = pixels_seen(layers, 0), pixels_seen(layers, 1)
    first, last = min(seen), max(seen)
    centre = (first + last) / 2
    mean = sum(a * b * math.dist((y, x), (centre, centre)) for y, a in seen.items() for x, b in seen.items())
    return last - first + 1, min(neighbour) - first, mean


@settings(deadline=None, max_examples=40)
@given(LAYERS)
def test_intervals_propagated_one_path_at_a_time(layers: list[SlidingLayer]) -> None:
    result = receptive_field(layers)
    for index in range(len(layers)):
        width, stride, mean = literal(layers[: index + 1])
        assert (result.receptive_field[index], result.stride[index]) == (width, stride)
        assert result.mean_distance[index] == pytest.approx(mean, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(LAYERS, st.integers(0, 9))
def test_the_support_of_the_gradient_of_real_convolutions(layers: list[SlidingLayer], seed: int) -> None:
    """A unit of a stack without padding depends on the first and last pixel of its field; fewer pixels make no unit."""
    generator = torch.Generator().manual_seed(seed)
    width = int(receptive_field(layers).receptive_field[-1])
    signal = torch.rand(1, 1, width, dtype=torch.float64, generator=generator).requires_grad_()
    weights = [torch.rand(1, 1, layer.kernel, dtype=torch.float64, generator=generator) + 0.1 for layer in layers]

    def through(values: Tensor) -> Tensor:
        for layer, weight in zip(layers, weights, strict=True):
            values = nn.functional.conv1d(values, weight, stride=layer.stride, dilation=layer.dilation)
        return values

    units = through(signal)
    assert units.shape == (1, 1, 1)
    (gradient,) = torch.autograd.grad(units.sum(), signal)
    assert set(gradient[0, 0].nonzero()[:, 0].tolist()) == set(pixels_seen(layers, 0))
    assert gradient[0, 0, 0] > 0
    assert gradient[0, 0, -1] > 0
    if width > 1:
        with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
            through(signal[..., 1:])


# The known networks, as torchvision builds them


def thin(model: nn.Module) -> nn.Module:
    """The model with one channel per convolution and uniform weights, so that only its geometry and graph remain.

    A maximum passes its gradient to one pixel only, so that a mean takes its place.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.Conv2d):
            conv = nn.Conv2d(1, 1, child.kernel_size, child.stride, child.padding, child.dilation, bias=False)  # type: ignore[arg-type]
            nn.init.constant_(conv.weight, 1 / conv.weight.numel())
            setattr(model, name, conv.double())
        elif isinstance(child, nn.MaxPool2d):
            setattr(model, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        elif isinstance(child, nn.BatchNorm2d | nn.ReLU | nn.Dropout | nn.Linear | nn.AdaptiveAvgPool2d):
            setattr(model, name, nn.Identity())
        else:
            thin(child)
    return model


def torchvision_model(network: str) -> nn.Module:
    from torchvision import models

    build = {"AlexNet": models.alexnet, "VGG-16": models.vgg16}.get(network, models.resnet50)
    with torch.device("meta"):
        model = build(weights=None)
    if network == "ResNet-50 v1":
        for stage in (model.layer2, model.layer3, model.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return thin(model).eval()


def outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Outputs of the convolutions and poolings of the main path, in order; shortcuts are left out."""
    found: list[Tensor] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.AvgPool2d) and "downsample" not in name:
            module.register_forward_hook(lambda module, inputs, output: found.append(output))
    getattr(model, "features", model)(image)
    return found


@pytest.mark.parametrize("network", ARCHITECTURES)
def test_known_networks_are_torchvision_s(network: str) -> None:
    """The rows that the middle unit of every layer depends on, in the model's own graph, shortcuts and padding included."""
    pytest.importorskip("torchvision")
    result = receptive_field(ARCHITECTURES[network], network=network)
    image = torch.rand(1, 1, 1200, 64, dtype=torch.float64, requires_grad=True)
    layers = outputs(torchvision_model(network), image)
    assert len(layers) == len(result.names)
    for index, output in enumerate(layers):
        middle = output.shape[2] // 2
        seen = []
        for unit in (middle, middle + 1):
            (gradient,) = torch.autograd.grad(output[0, 0, unit].sum(), image, retain_graph=True)
            rows = gradient[0, 0].sum(dim=1).nonzero()[:, 0]
            seen.append((int(rows[0]), int(rows[-1])))
        (first, last), (next_first, _) = seen
        assert first > 0, "the image is too small for this test"
        assert last < image.shape[2] - 1
        assert (last - first + 1, next_first - first) == (result.receptive_field[index], result.stride[index]), result.names[
            index
        ]


@pytest.mark.parametrize(
    ("network", "layer", "width", "stride"),
    [  # but for the last, as published with Araujo et al. 2019
        ("AlexNet", "conv1", 11, 4),
        ("AlexNet", "conv2", 51, 8),
        ("AlexNet", "conv5", 163, 16),
        ("AlexNet", "pool5", 195, 32),
        ("VGG-16", "conv5_3", 196, 16),
        ("VGG-16", "pool5", 212, 32),
        ("ResNet-50 v1", "conv5_3 1x1 out", 483, 32),
        ("ResNet-50", "conv5_3 1x1 out", 427, 32),
    ],
)
def test_published_receptive_fields(network: str, layer: str, width: int, stride: int) -> None:
    frame = receptive_field(ARCHITECTURES[network]).to_dataframe().set_index("name")
    assert (frame.receptive_field[layer], frame.stride[layer]) == (width, stride)


def test_depth_counts_convolutions_only() -> None:
    assert [int(receptive_field(layers).depth[-1]) for layers in ARCHITECTURES.values()] == [5, 13, 49, 49]
    assert receptive_field(MIXED).depth.tolist() == [1, 1, 2, 3]


# Closed forms


@pytest.mark.parametrize(("depth", "kernel", "width"), [(24, 3, 49), (1, 3, 3), (12, 3, 25), (10, 5, 41), (7, 1, 1)])
def test_a_plain_stack(depth: int, kernel: int, width: int) -> None:
    result = receptive_field(plain_stack(depth, kernel))
    assert result.receptive_field[-1] == width == 1 + depth * (kernel - 1)
    assert result.reach[-1] == depth * (kernel - 1) / 2
    assert set(result.stride) == {1}
    assert result.depth.tolist() == list(range(1, depth + 1))
    assert result.names[-1] == f"conv{depth}"


def test_even_kernels_make_a_normal_distribution() -> None:
    """Luo et al.: 24 kernels of 3 have a variance of 24 * 2/3 = 16 along an axis, and a mean distance of 4 sqrt(pi / 2)."""
    result = receptive_field(plain_stack(24))
    assert result.mean_distance[-1] == pytest.approx(4 * math.sqrt(math.pi / 2), rel=2e-3)
    growth = receptive_field(plain_stack(96)).mean_distance[-1] / result.mean_distance[-1]
    assert growth == pytest.approx(2, rel=2e-3)  # with the square root of depth


def test_one_even_kernel() -> None:
    assert receptive_field(plain_stack(1)).mean_distance[0] == pytest.approx((4 + 4 * math.sqrt(2)) / 9)
    assert receptive_field([SlidingLayer("pool", 2, 2)]).mean_distance[0] == pytest.approx(math.sqrt(0.5))
    assert receptive_field([SlidingLayer("point", 1)]).mean_distance[0] == 0


@settings(deadline=None, max_examples=40)
@given(LAYERS)
def test_nothing_seen_lies_beyond_the_corners(layers: list[SlidingLayer]) -> None:
    result = receptive_field(layers)
    assert (result.mean_distance <= math.sqrt(2) * result.reach + 1e-9).all()
    assert (np.diff(result.receptive_field, prepend=1) >= 0).all()


# The result


def test_the_table_has_a_row_a_layer() -> None:
    result = receptive_field(MIXED, network="mixed")
    frame = result.to_dataframe()
    assert list(frame) == ["network", "layer", "name", "depth", "receptive_field", "reach", "stride", "mean_distance"]
    assert frame.network.tolist() == ["mixed"] * 4
    assert frame.layer.tolist() == [0, 1, 2, 3]
    assert frame.name.tolist() == list("abcd")
    assert frame.receptive_field.tolist() == [5, 7, 23, 23]
    assert frame.reach.tolist() == [2.0, 3.0, 11.0, 11.0]
    assert frame.stride.tolist() == [2, 4, 4, 12]


def test_the_summary_has_the_last_layer_at_each_stride() -> None:
    summary = receptive_field(ARCHITECTURES["AlexNet"]).summary()
    assert summary["layer"].tolist() == ["conv1", "conv2", "conv5", "pool5"]
    assert summary["receptive field (px)"].tolist() == [11, 51, 163, 195]
    assert summary["stride"].tolist() == [4, 8, 16, 32]


def test_saved_and_read_back(tmp_path) -> None:
    result = receptive_field(MIXED, network="mixed")
    again = load_result(result.save(tmp_path / "field.safetensors"))
    assert isinstance(again, ReceptiveFieldResult)
    assert again.to_dataframe().equals(result.to_dataframe())
    assert again.provenance == result.provenance
    assert again.provenance["options"]["layers"][2] == {
        "name": "c",
        "kernel": 3,
        "stride": 1,
        "dilation": 2,
        "pooling": False,
    }


def test_plot_draws_on_the_axes_it_is_given() -> None:
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert receptive_field(MIXED).plot(ax=ax) is ax
    assert len(ax.lines) == 2


# Errors


def test_no_layers() -> None:
    with pytest.raises(InputError, match="there are no layers; pass at least one SlidingLayer"):
        receptive_field([])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"kernel": 0}, r"layer 'a' has kernel 0; each must be a whole number of at least 1"),
        ({"kernel": 3, "stride": -1, "dilation": 1.5}, r"layer 'a' has stride -1 and dilation 1.5; each must be"),
    ],
)
def test_sizes_that_are_none(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SlidingLayer("a", **sizes)


def test_the_known_networks_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        ARCHITECTURES["AlexNet"] = ()  # type: ignore[index]
