"""Our model against transformers' own, with transformers' weights under old and new names, and its image processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from tests.checkpoints.parity import assert_same, images, randomize
from vit_probe.checkpoints import load_model
from vit_probe.checkpoints.image_processors import preprocessing_from_processor
from vit_probe.errors import AssumptionWarning, InputError
from vit_probe.models.config import ViTConfig

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::vit_probe.errors.AssumptionWarning")

TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 48, "patch_size": 8, "num_labels": 7
}  # fmt: skip
MLP = {"intermediate_size": 96}
DINOV2_SMALL = Path(__file__).parents[3] / "shared/checkpoints/dinov2-small"

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTModel", "ViTConfig", MLP),
    "ViT, tanh GELU": ("ViTModel", "ViTConfig", MLP | {"hidden_act": "gelu_new"}),
    "ViT, quick GELU, no qkv bias": ("ViTModel", "ViTConfig", MLP | {"hidden_act": "quick_gelu", "qkv_bias": False}),
    "ViT with a head": ("ViTForImageClassification", "ViTConfig", MLP),
    "DeiT": ("DeiTModel", "DeiTConfig", MLP),
    "DeiT with a head": ("DeiTForImageClassification", "DeiTConfig", MLP),
    "DeiT with two heads": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", MLP),
    "DINOv2": ("Dinov2Model", "Dinov2Config", {}),
    "DINOv2 with a head": ("Dinov2ForImageClassification", "Dinov2Config", {}),
    "DINOv2 with SwiGLU": ("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"num_register_tokens": 3}),
    "DINOv2 with registers, SwiGLU and a head": (
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {"use_swiglu_ffn": True}
    ),
}  # fmt: skip


def _theirs(family: str) -> Any:
    model, config, arguments = FAMILIES[family]
    return randomize(getattr(transformers, model)(getattr(transformers, config)(**TINY, **arguments)))


def _outputs(ours: Any, theirs: Any, size: tuple[int, int]) -> None:
    interpolate = {"interpolate_pos_encoding": True} if "Dinov2" not in type(theirs).__name__ else {}
    with torch.no_grad():
        expected = theirs(images(*size), **interpolate)
        if hasattr(expected, "logits"):
            assert_same(ours(images(*size)), expected.logits)
        else:
            assert_same(ours.forward_features(images(*size)), expected.last_hidden_state)
            assert_same(ours(images(*size)), expected.last_hidden_state[:, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    theirs = _theirs(family)
    theirs.save_pretrained(tmp_path / "disk")
    on_disk = load_model(tmp_path / "disk")
    # The names of the model in memory, which differ from those that save_pretrained writes.
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/config.json").write_text((tmp_path / "disk/config.json").read_text())
    torch.save(theirs.state_dict(), tmp_path / "memory/pytorch_model.bin")
    in_memory = load_model(tmp_path / "memory")
    for size in ((48, 48), (64, 64), (40, 72)):
        _outputs(on_disk, theirs, size)
        _outputs(in_memory, theirs, size)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_dict_without_configuration(family: str, tmp_path: Path) -> None:
    """Shapes determine everything but the activation and the number of heads."""
    theirs = _theirs(family)
    save_file(theirs.state_dict(), tmp_path / "state.safetensors")
    activation = {"quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh"}.get(theirs.config.hidden_act)
    asked = {} if activation is None else {"activation": activation}
    with pytest.warns(AssumptionWarning, match="norm_eps=1e-" if asked else "activation=.*norm_eps=1e-"):
        ours = load_model(tmp_path / "state.safetensors", num_heads=4, **asked)
    assert ours.config.norm_eps == theirs.config.layer_norm_eps
    _outputs(ours, theirs, (48, 48))
    _outputs(ours, theirs, (40, 72))


def test_shards_and_the_file_in_the_folder(tmp_path: Path) -> None:
    theirs = _theirs("DINOv2 with a head")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    _outputs(load_model(tmp_path), theirs, (48, 48))
    first = min(tmp_path.glob("model-*.safetensors"))
    first.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=rf"model\.safetensors\.index\.json lists {first.name}, not found in"):
        load_model(tmp_path)
    theirs.save_pretrained(tmp_path / "whole")
    _outputs(load_model(tmp_path / "whole/model.safetensors"), theirs, (48, 48))


def test_non_square_images(tmp_path: Path) -> None:
    """transformers interpolates only square position tables, so the two are compared at the native size."""
    config = transformers.ViTConfig(**(TINY | MLP | {"image_size": [32, 72], "patch_size": [8, 8]}))
    theirs = randomize(transformers.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.image_size == (32, 72)
    with torch.no_grad():
        assert_same(ours(images(32, 72)), theirs(images(32, 72)).logits)


def test_the_published_base_size(tmp_path: Path) -> None:
    theirs = randomize(transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=3)))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, num_classes=0)
    with torch.no_grad():
        hidden = theirs.vit(images(224, batch=1)).last_hidden_state
        assert_same(ours.forward_features(images(224, batch=1)), hidden)
        assert_same(ours(images(224, batch=1)), hidden[:, 0])


@pytest.mark.skipif(
    not DINOV2_SMALL.is_dir(), reason=f"the pretrained DINOv2 ViT-S/14 is not here: {DINOV2_SMALL} does not exist"
)
def test_pretrained_dinov2() -> None:
    theirs = transformers.Dinov2Model.from_pretrained(DINOV2_SMALL).eval()
    ours = load_model(DINOV2_SMALL)
    assert ours.name == "dinov2-small"
    assert ours.config.image_size == (518, 518)
    assert ours.preprocessing is not None
    assert (ours.preprocessing.size, ours.preprocessing.resize, ours.preprocessing.interpolation) == (
        (224, 224),
        256,
        "bicubic",
    )
    assert ours.preprocessing.mean == (0.485, 0.456, 0.406)
    photograph = ours.preprocessing(Image.fromarray(load_sample_image("flower.jpg")))[None]
    for batch in (photograph, images(518, batch=1), images(252, 196, batch=1)):
        with torch.no_grad():
            assert_same(ours.forward_features(batch), theirs(batch).last_hidden_state)


PROCESSORS = {
    "ViTImageProcessor": ("vit", {}),
    "ViTImageProcessor, other size and filter": ("vit", {"size": {"height": 96, "width": 128}, "resample": 3}),
    "ViTImageProcessor, not normalised": ("vit", {"do_normalize": False}),
    "DeiTImageProcessor": ("deit", {}),
    "DeiTImageProcessor, not cropped": ("deit", {"do_center_crop": False}),
    "BitImageProcessor": ("dinov2", {"size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406]}),
    "BitImageProcessor, wide crop": ("dinov2", {"size": {"shortest_edge": 256}, "crop_size": {"height": 196, "width": 224}}),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_preprocessing_is_that_of_the_image_processor(case: str, tmp_path: Path) -> None:
    model_type, arguments = PROCESSORS[case]
    processor = getattr(transformers, case.partition(",")[0])(**arguments)
    processor.save_pretrained(tmp_path)
    ours = preprocessing_from_processor(
        model_type, ViTConfig(), json.loads((tmp_path / "preprocessor_config.json").read_text())
    )
    # The crop's margins are an even number of pixels here. An odd one is split differently: transformers puts the smaller half
    # first; torchvision, timm and `Preprocessing` put the half that is an even number first.
    photograph = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 600, 400))
    theirs = processor(photograph, return_tensors="pt").pixel_values[0]
    prepared = ours(photograph)
    assert prepared.shape == theirs.shape
    # transformers resizes tensors and we resize images, which round differently: by one grey level (of 255) in some pixels.
    assert (prepared - theirs).abs().max() < 3 / 255 / min(ours.std)
    assert (prepared - theirs).abs().mean() < 0.5 / 255 / min(ours.std)


def test_old_processor_files_and_defaults() -> None:
    """Feature extractors wrote sizes as single numbers: a square for ViT and DeiT, the shorter side for BiT."""
    vit = preprocessing_from_processor(
        "vit", ViTConfig(), {"feature_extractor_type": "ViTFeatureExtractor", "size": 384, "resample": 2}
    )
    assert (vit.size, vit.resize, vit.mean, vit.interpolation) == ((384, 384), (384, 384), (0.5, 0.5, 0.5), "bilinear")
    deit = preprocessing_from_processor(
        "deit", ViTConfig(), {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224}
    )
    assert (deit.size, deit.resize, deit.interpolation) == ((224, 224), (256, 256), "bicubic")
    bit = preprocessing_from_processor(
        "dinov2", ViTConfig(), {"image_processor_type": "BitImageProcessor", "size": 256, "resample": 1}
    )
    assert (bit.size, bit.resize, bit.interpolation) == ((224, 224), 256, "lanczos")
    unnamed = preprocessing_from_processor(
        "dinov2", ViTConfig(), {"size": {"shortest_edge": 100}, "crop_size": 96, "resample": 0}
    )
    assert (unnamed.size, unnamed.resize, unnamed.interpolation) == ((96, 96), 100, "nearest")


@pytest.mark.parametrize(
    ("model_type", "config", "size", "resize", "mean"),
    [
        ("vit", ViTConfig(image_size=384), (384, 384), (384, 384), 0.5),
        ("deit", ViTConfig(image_size=384), (384, 384), (439, 439), 0.485),
        ("dinov2", ViTConfig(image_size=518, patch_size=14), (224, 224), 256, 0.485),
        ("dinov2_with_registers", ViTConfig(image_size=60, patch_size=6), (60, 60), 69, 0.485),
    ],
)
def test_without_a_processor_file(model_type: str, config: ViTConfig, size: Any, resize: Any, mean: float) -> None:
    usual = preprocessing_from_processor(model_type, config, None)
    assert (usual.size, usual.resize, usual.mean[0]) == (size, resize, mean)
    assert usual(Image.fromarray(np.zeros((500, 600, 3), np.uint8))).shape == (3, *size)


def test_errors_explain_the_problem(tmp_path: Path) -> None:
    theirs = _theirs("ViT with a head")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def rewrite(**changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))

    rewrite(model_type="swin")
    with pytest.raises(
        InputError, match=r"model_type is 'swin'; supported are vit, vit_mae, deit, dinov2, dinov2_with_registers\)"
    ):
        load_model(tmp_path)
    rewrite(hidden_act="relu")
    with pytest.raises(
        InputError, match=r"activation 'relu'; VisionTransformer supports gelu, .*, quick_gelu\); models of other"
    ):
        load_model(tmp_path, num_heads=4)
    rewrite(num_hidden_layers=3)
    with pytest.raises(InputError, match=r"missing: blocks\.2\.attn\.proj\.bias, .*blocks\.2\.norm2\.weight"):
        load_model(tmp_path)
    for contradiction in ({"qkv_bias": False}, {"intermediate_size": 64}, {"num_channels": 1}, {"hidden_size": 64}):
        rewrite(**contradiction)
        with pytest.raises(InputError, match="the checkpoint does not fit the model it describes"):
            load_model(tmp_path)
    rewrite(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(
        InputError, match=r"are quantised \(config\.json has a quantization_config\); load the original weights"
    ):
        load_model(tmp_path)
    rewrite(image_size=64)
    with pytest.raises(InputError, match=r"37 entries, which does not fit images of 64 x 64 pixels"):
        load_model(tmp_path)
    rewrite()
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor", "size": {"pixels": 9}}')
    with pytest.raises(InputError, match=r"gives a size as \{'pixels': 9\}; supported are height and width"):
        load_model(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor", "resample": 7}')
    with pytest.raises(InputError, match=r"resample=7; supported are 0 to 3"):
        load_model(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config\.json is not valid JSON"):
        load_model(tmp_path)


def test_a_parameter_stored_twice(tmp_path: Path) -> None:
    state = dict(_theirs("ViT").state_dict())
    state["vit.layernorm.bias"] = state["layernorm.bias"].clone()
    save_file(state, tmp_path / "twice.safetensors")
    with pytest.raises(InputError, match=r"holds norm\.bias twice, once as vit\.layernorm\.bias"):
        load_model(tmp_path / "twice.safetensors", num_heads=4)
