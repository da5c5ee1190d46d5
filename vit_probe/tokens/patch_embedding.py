"""The layer that sees the image: its filters, the size of its patches, and the channels of the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vit_probe.attention.intercept import AttentionInterceptor, ForwardStopped, evaluation_mode, intercept_attention
from vit_probe.attention.wrappers import unwrap
from vit_probe.errors import InputError
from vit_probe.tokens.grid import first_parameter, first_tensor

__all__ = [
    "PatchEmbedding",
    "find_patch_embedding",
    "first_convolution",
    "input_channels",
    "native_image_size",
    "read_patch_size",
]

_SIZES = (96, 224, 240)  # of images for models that name no size: most patch sizes divide one of them
_MAX_CHANNELS = 16  # of images for models that name no number
_CODED_IMAGES = 62  # as many bits tell all pixels apart, and fit into an integer


@dataclass(frozen=True, eq=False)
class PatchEmbedding:
    """The first layer of a model that weighs pixels.

    Args:
        path: Path of the layer.
        filters: Its weights, as those of a convolution, in float64 on the CPU.
        stride: Pixels from one patch to the next, down and to the right.
        channels: Channels of the images.
    """

    path: str
    filters: Float[Tensor, "filter channel row col"]
    stride: tuple[int, int]
    channels: int


def find_patch_embedding(model: nn.Module) -> PatchEmbedding:
    """Find the layer of a model that sees the image: a convolution, or a linear layer over the pixels of each patch.

    It is the first to be called with something that depends on the image; the forward pass ends there. Which input of a linear
    layer stands for which pixel of its patch is read off random images. If the model cannot be called with images alone, it is
    the first convolution over 1, 3 or 4 channels that the model lists.

    Raises:
        InputError: If there is no such layer, it takes videos, or the inputs of a linear layer are not the pixels of patches.

    Examples:
        >>> found = find_patch_embedding(nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2)))
        >>> found.path, found.filters.shape, found.stride
        ('0', torch.Size([8, 3, 4, 4]), (4, 4))
    """
    model = unwrap(model)
    layer = _layer_of_images(model)
    if layer is not None and layer.is_convolution:
        return _convolution(layer.path, layer.module, layer.images[1])
    if layer is not None:
        return _linear(model, layer)
    path, convolution = first_convolution(model)
    if convolution is not None and convolution.in_channels in (1, 3, 4):
        return _convolution(path, convolution, convolution.in_channels)
    if any(isinstance(module, nn.Conv3d) for module in model.modules()):
        raise InputError(f"{type(model).__name__} takes videos: its convolutions extend over time; pass a model of images")
    raise InputError(
        f"{type(model).__name__} has no convolution or linear layer that sees the pixels of an image; pass a model of images"
    )


def read_patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch in pixels: from the model's own description, or from the layer that sees the image if its
    patches do not overlap.

    Raises:
        InputError: If neither is there, or the model drops patches at random.
    """
    model = unwrap(model)
    configs = _configs(model)
    if any(getattr(config, "mask_ratio", None) is not None for config in configs):
        raise InputError(f"{type(model).__name__} drops and shuffles patches at random, so they have no fixed positions")
    embedding = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)  # timm; embeds: NaFlexVit
    named = getattr(embedding, "patch_size", None)
    if embedding is not None and hasattr(embedding, "feat_ratio"):  # pixels per token, including a hybrid's stem
        named = embedding.feat_ratio(as_scalar=False)
    if named is None:
        named = _first_named([*configs, model], "patch_size")  # transformers, torchvision
    if isinstance(named, int):
        return named, named
    if named is not None and len(named) == 2:
        return int(named[0]), int(named[1])
    with suppress(InputError):
        found = find_patch_embedding(model)
        if tuple(found.filters.shape[2:]) == found.stride and max(found.stride) > 1:
            return found.stride
    raise InputError(
        f"cannot determine the patch size of {type(model).__name__}: it has no patch_embed.patch_size, no config.patch_size, "
        "and no first layer over patches that do not overlap; pass grid=TokenGrid(...)"
    )


def input_channels(model: nn.Module) -> int:
    """Number of channels of the model's images; 3 if no layer tells."""
    model = unwrap(model)
    layer = _layer_of_images(model)
    if layer is not None:
        return layer.images[1]
    _, convolution = first_convolution(model)
    return 3 if convolution is None else convolution.in_channels


def native_image_size(model: nn.Module) -> Any:
    """The image size that the model is built for, one side or (height, width); None if it names none."""
    model = unwrap(model)
    embeds = getattr(model, "embeds", None)
    grid, patch = getattr(embeds, "pos_embed_grid_size", None), getattr(embeds, "patch_size", None)
    sizes = (
        _first_named(_configs(model), "image_size"),  # transformers
        getattr(getattr(model, "patch_embed", None), "img_size", None),  # timm
        getattr(model, "image_size", None),  # torchvision
        getattr(getattr(model, "preprocessing", None), "size", None),
        (grid[0] * patch[0], grid[1] * patch[1]) if grid and patch else None,  # timm's NaFlexVit
        tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size", ())[1:]),  # timm
    )
    return next((size for size in sizes if size), None)


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d | None]:
    """Path of the first convolution that the model lists, and the convolution; an empty path and None if there is none."""
    convolutions = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return next(convolutions, ("", None))


def _configs(model: nn.Module) -> list[Any]:
    """The model's configuration, and those of the vision models inside it that transformers nests in it."""
    config = getattr(model, "config", None)
    nested = [getattr(config, name, None) for name in ("vision_config", "backbone_config")]
    return [one for one in (config, *nested) if one is not None]


def _first_named(configs: list[Any], name: str) -> Any:
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


def _image_shapes(model: nn.Module) -> Iterator[tuple[int, tuple[int, int]]]:
    """Numbers of channels and sizes of images to try, the likeliest first."""
    named = (_first_named(_configs(model), name) for name in ("num_channels", "in_channels"))
    listed = [module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    others = () if listed else range(1, _MAX_CHANNELS + 1)
    native = native_image_size(model)
    sizes = _SIZES if native is None else (native,)
    numbers = dict.fromkeys((*filter(None, named), 3, *listed, *others))
    for size in sizes:
        for channels in numbers:
            yield channels, (size, size) if isinstance(size, int) else tuple(size)


class _FirstLayer(AttentionInterceptor):
    """Ends a forward pass at the first layer that is called with something that depends on the image."""

    def __init__(self, images: torch.Size) -> None:
        super().__init__()
        self.images = images
        self.path = ""
        self.module: Any = None
        self.given = torch.empty(0)

    def before_forward(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().before_forward(name, module, args, kwargs)
        given = first_tensor((*args, *kwargs.values()))
        if given is None or _width(module) is None or len(given) % self.images[0] or not (given[0] != given[-1]).any():
            return
        self.path, self.module = name, module
        self.given = given.movedim(1, -1) if hasattr(module, "in_channels") else given
        raise ForwardStopped

    @property
    def is_convolution(self) -> bool:
        """Whether the layer is a convolution over the image, not over pixels that were rearranged to channels."""
        return hasattr(self.module, "in_channels") and self.given.shape[-1] == self.images[1]


def _width(module: Any) -> Any:
    """Number of values per position that a convolution or a linear layer weighs, quantised or not; None for other modules."""
    kernel = getattr(module, "kernel_size", None)  # of a pooling, it may be a number
    if isinstance(kernel, tuple) and len(kernel) == 2:
        return getattr(module, "in_channels", None)
    return getattr(module, "in_features", None)


def _layer_of_images(model: nn.Module) -> _FirstLayer | None:
    """The first layer that sees the images, for the first shape of images that fits it; None if there is none."""
    shapes = (torch.Size((2, channels, *size)) for channels, size in _image_shapes(model))
    layers = (_run_to_first_layer(model, shape) for shape in shapes)
    return next((layer for layer in layers if layer.given.shape[-1] == _width(layer.module)), None)


def _run_to_first_layer(model: nn.Module, shape: torch.Size) -> _FirstLayer:
    layer = _FirstLayer(shape)
    images = _random_images(shape).to(first_parameter(model))
    # Libraries raise all kinds of errors for images that they do not take.
    with suppress(ForwardStopped, Exception), evaluation_mode(model), intercept_attention(model, layer):
        model(images)
    return layer


def _random_images(shape: torch.Size) -> Float[Tensor, "image channel height width"]:
    """Images whose pixels are 1 or -1, so that a layer norm over a patch leaves their signs."""
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(0)).float() * 2 - 1


def _weight(module: Any) -> Float[Tensor, "filter *weights"]:
    weight = module.weight() if callable(module.weight) else module.weight  # quantised layers have a method
    return (weight.dequantize() if weight.is_quantized else weight).detach().cpu().double()


def _convolution(path: str, module: Any, channels: int) -> PatchEmbedding:
    rows, cols = module.stride
    return PatchEmbedding(path, _weight(module), (int(rows), int(cols)), channels)


def _linear(model: nn.Module, layer: _FirstLayer) -> PatchEmbedding:
    """The filters of a linear layer, whose inputs are matched with pixels by their values in random images."""
    layer = _run_to_first_layer(model, torch.Size((_CODED_IMAGES, *layer.images[1:])))
    images = _random_images(layer.images)
    given = layer.given.cpu().float().reshape(len(images), -1, layer.given.shape[-1])
    of_inputs, of_patches = _matching_pixels(given[:, 0], images), _matching_pixels(given[:, :, 0], images)
    if of_inputs is not None and of_patches is not None:
        channel, row, col = of_inputs
        row, col = row - row.min(), col - col.min()
        shape = torch.Size((images.shape[1], int(row.max()) + 1, int(col.max()) + 1))
        places = (channel * shape[1] + row) * shape[2] + col
        down, right = of_patches[1].unique(), of_patches[2].unique()
        is_raster = torch.equal(torch.cartesian_prod(down, right).mT, of_patches[1:])
        if is_raster and sorted(places.tolist()) == list(range(shape.numel())):
            weight = _weight(layer.module)
            filters = torch.empty_like(weight.flatten(1))
            filters[:, places] = weight.flatten(1)
            stride = (_step(down, shape[1]), _step(right, shape[2]))
            return PatchEmbedding(layer.path, filters.unflatten(1, shape), stride, shape[0])
    raise InputError(
        f"the first layer of {type(model).__name__} ({layer.path}), a {type(layer.module).__name__}, is not applied to the "
        "pixels of one patch after the other, row by row, so its filters cannot be arranged as pictures"
    )


def _step(places: Int[Tensor, "patch"], size: int) -> int:
    return int(places[1] - places[0]) if len(places) > 1 else size


def _matching_pixels(
    values: Float[Tensor, "image value"], images: Float[Tensor, "image channel row col"]
) -> Int[Tensor, "3 value"] | None:
    """Channel, row and column of the pixel that each value follows from image to image; None if one follows none."""
    pixels, order = _signatures(images.flatten(1)).sort()
    wanted = _signatures(values)
    found = torch.searchsorted(pixels, wanted).clamp_max(len(pixels) - 1)
    if not torch.equal(pixels[found], wanted):
        return None
    return torch.stack(torch.unravel_index(order[found], images.shape[1:]))


def _signatures(values: Float[Tensor, "image value"]) -> Int[Tensor, "value"]:
    """In which images each value is high and in which low, as one number; negating or scaling a value changes nothing."""
    high = values > values.mean(dim=0)
    return ((high ^ high[0]) * 2 ** torch.arange(len(high))[:, None]).sum(dim=0)
