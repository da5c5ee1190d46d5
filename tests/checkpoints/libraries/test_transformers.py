"""transformers' own models where `VisionTransformer` does not cover them, compared with what transformers itself builds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.checkpoints.libraries.conftest import change
from tests.checkpoints.parity import assert_same, images, randomize
from vit_probe.checkpoints import load_model
from vit_probe.checkpoints.libraries.transformers import _agree, _test_images
from vit_probe.data.preprocessing import IMAGENET_MEAN, Preprocessing
from vit_probe.errors import AssumptionWarning, InputError
from vit_probe.models.vit import VisionTransformer

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = TINY | {"image_size": 48, "patch_size": 8}
TEXT = TINY | {"vocab_size": 50, "max_position_embeddings": 16}
TOWERS = {"vision_config": VISION, "text_config": TEXT}
SIGLIP = {"vision_config": VISION, "text_config": TEXT | {"projection_size": 32}}
SQUARE = {"size": {"height": 48, "width": 48}}
CROPPED = {"size": {"shortest_edge": 60}, "crop_size": {"height": 48, "width": 48}}

# Class, configuration class and arguments of the saved model, its image processor, the class of the loaded model, and the path
# of the same part in the saved model.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], tuple[str, dict[str, Any]], str, str]] = {
    "CLIP": ("CLIPModel", "CLIPConfig", TOWERS, ("CLIPImageProcessor", CROPPED), "CLIPVisionModel", "vision_model"),
    "CLIP's image tower": (
        "CLIPVisionModel", "CLIPVisionConfig", VISION, ("CLIPImageProcessor", CROPPED), "CLIPVisionModel", ""
    ),
    "CLIP's image tower with a projection": (
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", VISION, ("CLIPImageProcessor", CROPPED), "CLIPVisionModel",
        "vision_model"
    ),
    "SigLIP": ("SiglipModel", "SiglipConfig", SIGLIP, ("SiglipImageProcessor", SQUARE), "SiglipVisionModel", "vision_model"),
    "SigLIP's image tower": (
        "SiglipVisionModel", "SiglipVisionConfig", VISION, ("SiglipImageProcessor", SQUARE), "SiglipVisionModel", ""
    ),
    "DINOv3": (
        "DINOv3ViTModel", "DINOv3ViTConfig", VISION | {"num_register_tokens": 3}, ("DINOv3ViTImageProcessor", SQUARE),
        "DINOv3ViTModel", ""
    ),
    "BEiT with a head": (
        "BeitForImageClassification", "BeitConfig", VISION | {"use_relative_position_bias": True, "num_labels": 5},
        ("BeitImageProcessor", SQUARE | {"do_center_crop": False}), "BeitModel", "beit"
    ),
    "I-JEPA": ("IJepaModel", "IJepaConfig", VISION, ("ViTImageProcessor", SQUARE), "IJepaModel", ""),
    "Swin": (
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}), "SwinModel", "swin"
    ),
    "ViT with ReLU": (
        "ViTForImageClassification", "ViTConfig", VISION | {"hidden_act": "relu"}, ("ViTImageProcessor", SQUARE),
        "ViTModel", "vit"
    ),
}  # fmt: skip


def _save(family: str, folder: Path) -> tuple[Any, Any]:
    """Save a model and its image processor to the folder, and return both."""
    model_class, config_class, arguments, (processor_class, settings), _, _ = FAMILIES[family]
    model = randomize(getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments)))
    processor = getattr(transformers, processor_class)(**settings)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_model_with_its_weights_and_preprocessing(
    family: str, tmp_path: Path, photograph: Image.Image
) -> None:
    saved, processor = _save(family, tmp_path / "mine")
    *_, loaded_class, part = FAMILIES[family]
    theirs = saved.get_submodule(part)
    ours = load_model(tmp_path / "mine")
    assert type(ours) is getattr(transformers, loaded_class)
    assert (ours.name, ours.training, ours.dtype) == ("mine", False, torch.float32)
    pixels = processor(photograph, return_tensors="pt").pixel_values
    with torch.no_grad():
        assert_same(ours(pixels).last_hidden_state, theirs(pixels).last_hidden_state, tolerance=1e-6)
    prepared = ours.preprocessing(photograph)
    assert prepared.shape == pixels[0].shape
    # transformers resizes tensors and we resize images, which round differently: by one grey level (of 255) in some pixels.
    # DINOv3 differs by more at edges, because its processor keeps values that the bicubic filter moves below 0 or above 255.
    assert (prepared - pixels[0]).abs().mean() < 0.5 / 255 / min(ours.preprocessing.std)
    limit = 30 if family == "DINOv3" else 3
    assert (prepared - pixels[0]).abs().max() < limit / 255 / min(ours.preprocessing.std)


def test_from_the_hubs_cache_in_half_precision(put: Callable[[str, Path], None], tmp_path: Path) -> None:
    saved, _ = _save("CLIP", tmp_path / "saved")
    saved.half().save_pretrained(tmp_path / "saved")
    put("someone/clip", tmp_path / "saved")
    ours = load_model("hf:someone/clip")
    assert (type(ours).__name__, ours.name) == ("CLIPVisionModel", "hf:someone/clip")
    with torch.no_grad():
        expected = saved.float().vision_model(images(48)).last_hidden_state
        assert_same(ours(images(48)).last_hidden_state, expected, tolerance=1e-6)


def test_a_processor_that_was_saved_with_a_tokenizer(tmp_path: Path) -> None:
    """transformers 5 then writes one file, with the image processor's settings inside."""
    _save("CLIP", tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": settings, "processor_class": "CLIPProcessor"})
    )
    prepared = load_model(tmp_path).preprocessing
    assert (prepared.size, prepared.resize, prepared.interpolation) == ((48, 48), 60, "bicubic")
    assert prepared.mean == (0.48145466, 0.4578275, 0.40821073)


def test_without_a_processor_imagenets_preprocessing_is_assumed(tmp_path: Path) -> None:
    _save("SigLIP", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.warns(AssumptionWarning, match="assumed, .*shorter side to 55 pixels and cutting 48 x 48 "):
        prepared = load_model(tmp_path).preprocessing
    assert prepared == Preprocessing.imagenet((48, 48))


def test_a_crop_that_is_one_pixel_off_is_noticed(tmp_path: Path) -> None:
    _, processor = _save("CLIP", tmp_path)
    for crop in (45, 46, 47, 48):  # margins of 15 to 12 pixels beside the shorter side, and of any remainder beside the longer
        processor = type(processor)(**CROPPED | {"crop_size": {"height": crop, "width": crop}})
        processor.save_pretrained(tmp_path)
        ours = load_model(tmp_path).preprocessing
        assert (ours.size, ours.crop_rounding) == ((crop, crop), "down")
        other = replace(ours, crop_rounding="half_to_even")
        agreeing = [[_agree(prepare, processor, image) for image in _test_images(ours)] for prepare in (ours, other)]
        assert all(agreeing[0])
        assert not all(agreeing[1])


def test_sams_image_encoder(tmp_path: Path, photograph: Image.Image) -> None:
    """SAM's processor pads: the photograph is resized to the padded size instead, with a warning."""
    small = {"hidden_size": 16, "image_size": 64, "patch_size": 8}
    config = transformers.SamConfig(
        vision_config=VISION | {"image_size": 64, "output_channels": 16, "mlp_dim": 48, "window_size": 4},
        prompt_encoder_config=small,
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    saved = randomize(transformers.SamModel(config))
    saved.save_pretrained(tmp_path)
    frame = {"height": 64, "width": 64}
    transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size=frame).save_pretrained(tmp_path)
    with pytest.warns(AssumptionWarning, match="pads it; here .* exactly 64 x 64 pixels instead"):
        ours = load_model(tmp_path)
    assert type(ours).__name__ == "SamVisionModel"
    assert ours.preprocessing == Preprocessing((64, 64), (64, 64), mean=IMAGENET_MEAN, interpolation="bilinear")
    prepared = ours.preprocessing(photograph)[None]
    with torch.no_grad():
        assert torch.equal(ours(prepared).last_hidden_state, saved.vision_encoder(prepared).last_hidden_state)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 48}},  # crops by a ratio of its own
        {"image_processor_type": "MobileViTImageProcessor", **CROPPED},  # swaps red and blue
        {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8},  # returns patches instead of an image
        {"image_processor_type": "SomeImageProcessor", "auto_map": {"AutoImageProcessor": "code.SomeImageProcessor"}},
    ],
    ids=lambda settings: settings["image_processor_type"],
)
def test_processors_that_do_more_than_resize_and_crop_are_not_converted(settings: dict[str, Any], tmp_path: Path) -> None:
    _save("SigLIP", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text("open('ran', 'w')")
    assert load_model(tmp_path).preprocessing is None
    assert not Path("ran").exists()


def test_a_processor_that_cannot_be_run_is_converted_with_a_warning(tmp_path: Path) -> None:
    _save("CLIP", tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    code = {"image_processor_type": "SomeImageProcessor", "auto_map": {"AutoImageProcessor": "code.SomeImageProcessor"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | code))
    with pytest.warns(
        AssumptionWarning, match=r"cannot be run here \(.*\); photographs are prepared according to its configuration alone"
    ):
        prepared = load_model(tmp_path).preprocessing
    assert (prepared.size, prepared.resize, prepared.interpolation) == ((48, 48), 60, "bicubic")


def test_siglip2_takes_patches_and_has_no_preprocessing(tmp_path: Path) -> None:
    config = transformers.Siglip2Config(
        vision_config=TINY | {"patch_size": 8, "num_patches": 36}, text_config=TEXT | {"projection_size": 32}
    )
    transformers.Siglip2Model(config).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (type(ours).__name__, ours.preprocessing) == ("Siglip2VisionModel", None)


@pytest.mark.parametrize("decoder", [True, False])
def test_mae_is_ours_without_its_decoder(decoder: bool, tmp_path: Path) -> None:
    """transformers' model masks and shuffles patches at random; with both switched off, it equals ours."""
    small = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
    config = transformers.ViTMAEConfig(**VISION, **small, decoder_intermediate_size=32, mask_ratio=0.0)
    saved = randomize((transformers.ViTMAEForPreTraining if decoder else transformers.ViTMAEModel)(config))
    saved.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(image_mean=[0.4] * 3, **SQUARE).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert isinstance(ours, VisionTransformer)
    assert ours.preprocessing is not None
    assert (ours.preprocessing.resize, ours.preprocessing.mean) == ((48, 48), (0.4, 0.4, 0.4))
    with torch.no_grad():
        theirs = (saved.vit if decoder else saved)(images(48), noise=torch.arange(36.0).expand(2, -1)).last_hidden_state
        assert_same(ours.forward_features(images(48)), theirs)
    (tmp_path / "preprocessor_config.json").unlink()
    usual = Preprocessing((48, 48), (48, 48), interpolation="bilinear", crop_rounding="down")
    assert load_model(tmp_path).preprocessing == usual


def test_a_pooler_is_left_out_where_the_file_has_none(tmp_path: Path) -> None:
    """Pre-trained files often have none; transformers would initialise one at random."""
    config = transformers.BeitConfig(**VISION, use_absolute_position_embeddings=True, use_mask_token=True)
    saved = randomize(transformers.BeitForMaskedImageModeling(config))
    saved.save_pretrained(tmp_path)
    transformers.BeitImageProcessor(**SQUARE, do_center_crop=False).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (type(ours).__name__, ours.pooler) == ("BeitModel", None)
    with torch.no_grad():
        assert_same(ours(images(48)).last_hidden_state, saved.beit(images(48)).last_hidden_state, tolerance=1e-6)


def test_overrides_are_rejected(tmp_path: Path) -> None:
    _save("DINOv3", tmp_path)
    message = r"is loaded by transformers, because VisionTransformer does not cover it \(its model_type is 'dinov3_vit'; .*"
    with pytest.raises(InputError, match=message + "leave out num_heads, image_size$"):
        load_model(tmp_path, num_heads=4, image_size=48)


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save("SigLIP", tmp_path / "siglip")
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path / "vit")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        InputError, match=r"siglip can be loaded neither .* nor with transformers \(a model of type 'siglip' needs the package "
        r"transformers: pip install 'vit-probe\[transformers\]'\)$"
    ):  # fmt: skip
        load_model(tmp_path / "siglip")
    assert isinstance(load_model(tmp_path / "vit"), VisionTransformer)


def test_a_class_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save("SigLIP", tmp_path)

    class Broken:
        def __contains__(self, key: object) -> bool:
            try:
                raise RuntimeError("operator torchvision::nms does not exist")
            except RuntimeError as error:
                raise ModuleNotFoundError("Could not import module 'SiglipVisionModel'") from error

    monkeypatch.setattr(sys.modules["transformers"], "MODEL_MAPPING", Broken())  # it replaces itself there when imported
    with pytest.raises(
        InputError, match=r"transformers, which is installed but cannot be imported \(operator torchvision::nms "
    ):
        load_model(tmp_path)


def test_an_invalid_configuration(tmp_path: Path) -> None:
    _save("CLIP", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for invalid in ({"vision_config": {"layer_norm_eps": -1}}, {"dtype": "nope"}):
        (tmp_path / "config.json").write_text(json.dumps(config | invalid))
        with pytest.raises(InputError, match=r"config\.json is no valid configuration of a model of type 'clip' \(.*\w"):
            load_model(tmp_path)


def test_an_absurd_size_of_photographs(tmp_path: Path) -> None:
    _, processor = _save("CLIP", tmp_path)
    type(processor)(**CROPPED | {"size": {"shortest_edge": 10**6}}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the image processor has shortest_edge 1000000; at most 16384 pixels"):
        load_model(tmp_path)


def test_a_model_type_that_transformers_does_not_have(tmp_path: Path) -> None:
    _save("SigLIP", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "siglop", "auto_map": code}))
    (tmp_path / "code.py").write_text("open('ran', 'w')")
    with pytest.raises(
        InputError,
        match=r"nor with transformers \(transformers \d\S+ has no model of type 'siglop' .*similar names are .*siglip",
    ):
        load_model(tmp_path)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("SigLIP", "vision_model.encoder."), ("I-JEPA", "encoder.layer."), ("BEiT with a head", "beit.encoder.")],
)
def test_parameters_that_do_not_fit_are_rejected(family: str, prefix: str, tmp_path: Path) -> None:
    _save(family, tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.startswith(prefix) and name.endswith("weight")]
    *_, loaded_class, _ = FAMILIES[family]
    shape = load_file(tmp_path / "model.safetensors")[names[0]].shape
    change(tmp_path, **{f"{prefix}extra.weight": torch.zeros(3)})
    with pytest.raises(
        InputError, match=rf"nor with transformers \(the weights do not fit {loaded_class}; unexpected: .*extra\.weight"
    ):
        load_model(tmp_path)
    change(tmp_path, remove=f"{prefix}extra.weight", **{names[0]: torch.zeros(3, 3)})
    with pytest.raises(InputError, match=rf"the weights do not load into {loaded_class}: .*mismatch|wrongly shaped"):
        load_model(tmp_path)
    change(tmp_path, **{names[0]: torch.full(shape, torch.inf)})
    with pytest.raises(InputError, match="holds NaN or infinity"):
        load_model(tmp_path)
    change(tmp_path, remove=names[0])
    with pytest.raises(InputError, match=rf"the weights do not fit {loaded_class}; missing: "):
        load_model(tmp_path)


def test_a_missing_image_tower_is_not_initialised_at_random(tmp_path: Path) -> None:
    _save("CLIP", tmp_path)
    change(tmp_path, remove="vision_model.")
    with pytest.raises(InputError, match=r"do not fit CLIPVisionModel; missing: embeddings\.class_embedding"):
        load_model(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    _save("DINOv3", tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config\.json is not valid JSON"):
        load_model(tmp_path)


def test_settings_of_transformers_are_restored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging = transformers.utils.logging
    _save("SigLIP", tmp_path)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    load_model(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
