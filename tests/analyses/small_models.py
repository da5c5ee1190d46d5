"""Small models for images of 16 pixels, such as `train_variants` trains, and photographs for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from analyses.train_demo import small_resnet
from tests import reference
from tests.checkpoints.parity import randomize
from tests.example_models import expected_attention
from vit_probe import Preprocessing, VisionTransformer, ViTConfig, save_model
from vit_probe.data.image_files import read_image

__all__ = ["attention_distances", "new_model", "write_model", "write_photographs"]


def new_model(position: str = "learned_1d", stem: str = "patches", *, seed: int = 0, scale: float = 1.0) -> VisionTransformer:
    """4 x 4 patches of 4 pixels, 3 layers of 2 heads; attention is the less uniform, the larger `scale` is."""
    torch.manual_seed(seed)
    resnet = small_resnet(4) if stem == "hybrid" else None
    config = ViTConfig(
        16, 1 if resnet else 4, embed_dim=16, depth=3, num_heads=2, num_classes=3, position=position, stem=resnet
    )  # type: ignore[arg-type]
    model = VisionTransformer(config)
    randomize(model, seed)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= scale
    model.preprocessing = Preprocessing((16, 16), resize=16)
    return model


def write_model(path: Path, *kind: str, seed: int = 0, scale: float = 1.0) -> VisionTransformer:
    """The model, written to a file."""
    model = new_model(*kind, seed=seed, scale=scale)
    save_model(model, path)
    return model


def write_photographs(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def attention_distances(model: VisionTransformer, folder: Path) -> np.ndarray:
    """(layer, head), in pixels: the literal definition, applied to the attention that the model itself computes."""
    assert model.preprocessing is not None
    images = torch.stack([model.preprocessing(read_image(path)) for path in sorted(folder.iterdir())])
    attention = expected_attention(model, images)
    return reference.mean_attention_distance(attention, 4, 4, (4, 4), 1, "renormalize").mean
