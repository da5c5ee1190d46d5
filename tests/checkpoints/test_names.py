"""Suggestions for names without their source."""

from __future__ import annotations

import pytest

from vit_probe.checkpoints import load_model
from vit_probe.checkpoints.names import suggest_source
from vit_probe.errors import InputError


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("facebook/dinov2-small", "hf:facebook/dinov2-small"),
        ("google/vit-base-patch16-224-in21k", "hf:google/vit-base-patch16-224-in21k"),
        ("dinov2-small", "hf:ORG/dinov2-small"),
        ("https://huggingface.co/google/vit-base/tree/main", "hf:google/vit-base"),
        ("vit_base_patch16_224.augreg_in21k", "timm:vit_base_patch16_224.augreg_in21k"),
        ("vit_b_16", "torchvision:vit_b_16"),
        ("dinov2_vits14", "hf:facebook/dinov2-small"),
        ("dinov2_vitg14_reg", "hf:facebook/dinov2-with-registers-giant"),
        ("dino_vitb8", "hf:facebook/dino-vitb8"),
        ("swin_t.IMAGENET1K_V1", "torchvision:swin_t.IMAGENET1K_V1"),
        ("ViT-B-32", "open_clip:ViT-B-32/TAG"),
        ("ViT-B-16-SigLIP/webli", "open_clip:ViT-B-16-SigLIP/webli"),
        ("ViT-L/14@336px", "open_clip:ViT-L-14-336/openai"),
        ("huggingface:google/vit", "hf:google/vit"),
        ("HF:google/vit", "hf:google/vit"),
        ("timm/vit_base_patch16_224", "timm:vit_base_patch16_224"),
        ("torchvison:vit_b_16", "torchvision:vit_b_16"),
        ("open-clip:ViT-B-32/openai", "open_clip:ViT-B-32/openai"),
    ],
)
def test_what_was_meant(name: str, meant: str) -> None:
    assert suggest_source(name) == meant
    with pytest.raises(InputError, match=r"^there is no checkpoint file or folder .*; did you mean ") as caught:
        load_model(name)
    assert str(caught.value).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    "name",
    ["", " ", "model", "model.pth", "weights/vit.safetensors", "./google/vit", "~/google/vit", "/a/b", "C:\\vit", "12:30"],
)
def test_paths_and_other_strings(name: str) -> None:
    assert suggest_source(name) is None
