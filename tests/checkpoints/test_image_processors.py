"""Settings of transformers' image processors: the same pixels as its own, or no preprocessing at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vit_probe import ViTConfig
from vit_probe.checkpoints.image_processors import preprocessing_from_processor, preprocessing_from_settings

transformers = pytest.importorskip("transformers")

SETTINGS: dict[str, Any] = {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
SETTINGS |= {"resample": 3, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
SQUARE = {"size": {"height": 20, "width": 24}, "crop_size": {"height": 15, "width": 16}}

# Class and arguments. Those that end in Pil resize as Pillow does; the others resize tensors, and round differently.
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "BiT": ("BitImageProcessorPil", {}),
    "BiT with tensors": ("BitImageProcessor", {}),
    "crop of odd size": ("BitImageProcessorPil", {"crop_size": {"height": 13, "width": 18}}),
    "CLIP": ("CLIPImageProcessorPil", {}),
    "DeiT": ("DeiTImageProcessorPil", SQUARE),
    "DeiT with tensors": ("DeiTImageProcessor", SQUARE),
    "ViT": ("ViTImageProcessorPil", {"size": {"height": 20, "width": 24}, "do_center_crop": False, "resample": 2}),
    "ViT with tensors": ("ViTImageProcessor", {"size": {"height": 20, "width": 24}, "do_center_crop": False, "resample": 2}),
    "Lanczos": ("BitImageProcessorPil", {"resample": 1}),
    "nearest": ("BitImageProcessorPil", {"resample": 0}),
    "not normalised": ("BitImageProcessorPil", {"do_normalize": False}),
    "not rescaled": ("BitImageProcessorPil", {"do_rescale": False}),
    "rescaled to [0, 2]": ("BitImageProcessorPil", {"rescale_factor": 2 / 255}),
    "neither rescaled nor normalised": ("BitImageProcessorPil", {"do_rescale": False, "do_normalize": False}),
    "one mean for all channels": ("BitImageProcessorPil", {"image_mean": 0.5, "image_std": 0.25}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor(name: str) -> None:
    """For sizes whose margins are odd and even, in both directions, and images that are made smaller, larger or neither."""
    class_name, arguments = PROCESSORS[name]
    processor = getattr(transformers, class_name)(**SETTINGS | arguments)
    ours = preprocessing_from_settings(processor.to_dict())
    assert ours is not None
    waves = np.sin(np.mgrid[:100, :100] / 4).sum(axis=0)[..., None] * [60, 50, -40] + 128
    limit = 0.01 if class_name.endswith("Pil") else 2.01  # grey levels of 255
    for width, height in [(24, 24 + more) for more in range(5)] + [(41, 50), (63, 49), (65, 50), (67, 50), (20, 31), (96, 25)]:
        photograph = Image.fromarray(waves[:height, :width].round().astype(np.uint8))
        theirs = torch.as_tensor(np.asarray(processor(photograph, return_tensors="np")["pixel_values"]))[0].float()
        grey_levels = (ours(photograph) - theirs).abs() * torch.tensor(ours.std)[:, None, None] * 255
        assert grey_levels.max() < limit, (width, height)
        assert grey_levels.mean() < limit / 8, (width, height)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"do_pad": True},
        {"crop_pct": 0.9},
        {"do_center_crop": False},  # images of different sizes
        {"size": {"shortest_edge": 24, "longest_edge": 30}},
        {"size": {"longest_edge": 30}},
        {"size": {"max_height": 20, "max_width": 20}},
        {"size": 24},  # the shorter side or a square, depending on the class
        {"crop_size": 32},  # pads
        {"image_mean": [0.5], "image_std": [0.5]},  # one channel
    ],
    ids=str,
)
def test_what_cannot_be_expressed_has_no_preprocessing(settings: dict[str, Any]) -> None:
    assert preprocessing_from_settings(SETTINGS | settings) is None
    assert preprocessing_from_processor("dinov2", ViTConfig(), SETTINGS | {"image_processor_type": "Other"} | settings) is None


def test_a_single_number_means_what_it_means_for_the_class() -> None:
    def resize(model_type: str, **settings: Any) -> Any:
        preprocessing = preprocessing_from_processor(model_type, ViTConfig(), {"size": 256} | settings)
        return preprocessing and preprocessing.resize

    assert resize("dinov2") == resize("vit", image_processor_type="BitImageProcessorFast") == 256
    assert resize("vit") == resize("dinov2", feature_extractor_type="ViTFeatureExtractor") == (256, 256)
    assert resize("dinov2", image_processor_type="SomeImageProcessor") is None


def test_sizes_that_were_saved_with_empty_entries() -> None:
    size = {"shortest_edge": 24, "longest_edge": None, "height": None}
    preprocessing = preprocessing_from_settings(SETTINGS | {"size": size})
    assert preprocessing is not None
    assert (preprocessing.resize, preprocessing.crop_rounding) == (24, "down")


@pytest.mark.parametrize("model_type", ["vit", "vit_mae", "deit", "dinov2"])
def test_without_a_file_the_crop_is_still_transformers(model_type: str) -> None:
    preprocessing = preprocessing_from_processor(model_type, ViTConfig(), None)
    assert preprocessing is not None
    assert preprocessing.crop_rounding == "down"
