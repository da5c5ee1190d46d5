"""Train the model that comes with the package.

    python -m analyses.train_demo DATA --out out/train_demo

DATA holds `train` and `val`; each holds, for each class, either one sheet of small images or one folder of images (see
`small_images.read_split`). They must fit into memory. The recipe is `training.Recipe`.

If a training is interrupted at any moment, the same command continues after the last complete epoch. OUT receives `log.csv`,
`curve.png`, `model.safetensors` (the averaged weights in float16), the same weights after 0, 1, 2, 4, 8, ... epochs in
`snapshots`, and `state.pt`, from which training continues.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

from analyses.small_images import read_data
from analyses.training import Recipe, accuracy, fit
from vit_probe import InputError, Preprocessing, VisionTransformer, ViTConfig
from vit_probe.atomic_io import writable_folder
from vit_probe.cli.study import run_study
from vit_probe.models.config import Position, ResNetConfig

LOCALITY = 0.75  # scale of the early layers' query and key projections: how strongly a token prefers similar tokens
FILTERS = 0.01  # initial scale of the patch filters, so that their structure after training was learned


@torch.no_grad()
def initialise(model: VisionTransformer) -> VisionTransformer:
    """Initialise the weights for training on little data.

    Matrices are initialised as in the ViT paper's code (Xavier), and positions are as large as in its successor, big_vision. In
    the first third of the layers, queries and keys are projected alike, so that a token first attends to similar tokens, above
    all to itself (a part of mimetic initialisation, Trockman & Kolter 2023, arXiv:2305.09828); how attention moves on from
    there is learned.
    """
    for layer, block in enumerate(model.blocks):
        query, key, value = block.attn.qkv.weight.chunk(3)
        for matrix in (query, key, value, block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight):
            nn.init.xavier_uniform_(matrix)
        if layer < model.config.depth / 3:
            key.copy_(query.mul_(LOCALITY))
    for name, parameter in model.named_parameters():
        if name.startswith("pos_embed") and parameter.requires_grad:
            nn.init.normal_(parameter, std=model.config.embed_dim**-0.5)
    stem: Any = model.patch_embed
    stem.proj.weight.mul_(FILTERS)
    return model


def small_resnet(patch_size: int) -> ResNetConfig:
    """The smallest ResNet of the papers' kind whose map has one cell per patch: one unit per stage, 32 channels at its root.

    Raises:
        InputError: If no such map has cells of this size.
    """
    resnet = ResNetConfig((1,) * (patch_size // 4).bit_length(), width=32)
    if resnet.stride != patch_size:
        raise InputError(f"a hybrid must have patches of 4, 8, 16, ... pixels, got {patch_size}; pass another --patch-size")
    return resnet


def main(
    data: Annotated[Path, typer.Argument(help="Folder with `train` and `val`.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, the log and the state.")] = Path("out/train_demo"),
    image_size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 64,
    patch_size: Annotated[int, typer.Option(help="Side of a patch, in pixels.")] = 8,
    width: Annotated[int, typer.Option(help="Dimension of the tokens.")] = 144,
    depth: Annotated[int, typer.Option(help="Number of layers.")] = 9,
    heads: Annotated[int, typer.Option(help="Number of heads per layer.")] = 6,
    position: Annotated[Position, typer.Option(help="Position embedding.")] = "learned_1d",
    stem: Annotated[
        Literal["patches", "hybrid"],
        typer.Option(help="Make tokens from patches of pixels, or from the cells of a small ResNet's map."),
    ] = "patches",
    drop_path: Annotated[float, typer.Option(help="Rate of stochastic depth in the last layer.")] = 0.05,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change the recipe; may be repeated.")
    ] = None,
) -> None:
    """Train the model that comes with the package."""
    recipe = Recipe().changed(settings or [])
    resnet = small_resnet(patch_size) if stem == "hybrid" else None
    config = ViTConfig(
        image_size,
        1 if resnet else patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        position=position,
        drop_path=drop_path,
        stem=resnet,
    )
    writable_folder(out)
    train, val = read_data(data, image_size)
    torch.manual_seed(recipe.seed)
    model = initialise(VisionTransformer(config).replace_head(len(train.classes)))
    model.preprocessing = Preprocessing((image_size, image_size), resize=image_size)
    model = fit(model, train, val, recipe, out)
    print("validation top-1 {:.2f} %, top-5 {:.2f} %, in float32".format(*accuracy(model, val)))


if __name__ == "__main__":
    run_study(main)
