"""Models that cannot be run on the images, and what the errors say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.example_models import Encoder, small_vit
from vit_probe import InputError, mean_attention_distance
from vit_probe.tokens.locate import locate_tokens


class TwoTowers(nn.Module):
    """Like CLIP: images and texts, each with a tower of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.visual = nn.Embedding(10, 16), nn.ModuleDict({"trunk": small_vit()})

    def forward(self, images: Tensor, texts: Tensor | None = None) -> Tensor:
        return self.text(texts).mean(1) @ self.visual["trunk"](images).mT


class Videos(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, 16, (2, 8, 8), (2, 8, 8))

    def forward(self, videos: Tensor) -> Tensor:
        _batch, _frames, _channels, _height, _width = videos.shape
        return self.proj(videos.transpose(1, 2))


class ImagesAndMore(nn.Module):
    def forward(self, images: Tensor, points: Tensor) -> Tensor:
        return images


class DropsPatches(nn.Module):
    """Keeps a random half of the tokens, as masked autoencoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.blocks = nn.Conv2d(3, 16, 8, 8), small_vit().blocks

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.proj(images).flatten(2).mT
        keep = torch.rand(tokens.shape[:2]).argsort(1)[:, :6]
        tokens = torch.gather(tokens, 1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TwoTowers(), r"TwoTowers cannot be called with these images .*: pass model.visual.trunk \(a VisionTransformer\)"),
        (Videos(), "Videos takes videos, several frames at a time"),
        (ImagesAndMore(), r"ImagesAndMore cannot be called with images alone \(TypeError: .*points"),
        (
            DropsPatches(),
            "DropsPatches gives the same image other tokens each time: it drops, shuffles or changes them at random",
        ),
    ],
)
def test_what_to_pass_instead(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        locate_tokens(model.eval(), 24, 24)


def test_torchscript() -> None:
    graph = torch.jit.trace(Encoder().eval(), torch.randn(2, 3, 32, 48), check_trace=False)
    with pytest.raises(InputError, match="TorchScript"):
        mean_attention_distance(graph, torch.randn(1, 3, 40, 48))


def test_images_of_other_channels() -> None:
    with pytest.raises(InputError, match=r"takes images of 3 channels, but these have 1 .*convert the images"):
        mean_attention_distance(Encoder(), torch.zeros(1, 1, 32, 48))


def test_numbers_that_overflow() -> None:
    model = small_vit().half()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias.fill_(6e4)
        model.blocks[0].attn.proj.bias.fill_(6e4)
    with pytest.raises(InputError, match=r"queries or keys of layer 1 \(blocks.1.attn\) are not finite.*overflow.*float16"):
        mean_attention_distance(model, torch.rand(1, 3, 24, 24).half())
