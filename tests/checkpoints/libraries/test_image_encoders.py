"""Models of transformers with an image encoder inside: which part is loaded, and that it computes the same as in the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.libraries.conftest import change
from tests.checkpoints.parity import images, randomize
from vit_probe import mean_attention_distance
from vit_probe.checkpoints import load_model
from vit_probe.errors import InputError

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::vit_probe.errors.AssumptionWarning")

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
VISION = TINY | {"image_size": 48, "patch_size": 8}
TEXT = TINY | {"num_hidden_layers": 1, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
DENSE = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}


def _dinov2() -> Any:
    return transformers.Dinov2Config(
        **(VISION | {"image_size": 56, "patch_size": 14}), out_indices=[1, 2, 3, 4], reshape_hidden_states=False
    )


def _depth_anything() -> Any:
    config = transformers.DepthAnythingConfig(backbone_config=_dinov2(), reassemble_hidden_size=32, patch_size=14, **DENSE)
    return transformers.DepthAnythingForDepthEstimation(config)


def _dpt() -> Any:
    config = transformers.DPTConfig(
        backbone_config=_dinov2(), hidden_size=32, image_size=56, patch_size=14, reassemble_factors=[4, 2, 1, 0.5], **DENSE
    )
    return transformers.DPTForDepthEstimation(config)


def _llava() -> Any:
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=4)
    vision = transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)
    ).half()


def _trocr() -> Any:
    small = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    decoder = transformers.TrOCRConfig(vocab_size=50, max_position_embeddings=16, **small)
    encoder = transformers.ViTModel(transformers.ViTConfig(**VISION))
    return transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=transformers.TrOCRForCausalLM(decoder))


def _owl_vit() -> Any:
    config = transformers.OwlViTConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    return transformers.OwlViTForObjectDetection(config)


# The saved model, the class of the loaded model, and the path of the same part in the saved model.
MODELS: dict[str, tuple[Any, str, str]] = {
    "Depth Anything": (_depth_anything, "DepthAnythingForDepthEstimation", ""),
    "DPT with a backbone": (_dpt, "DPTForDepthEstimation", ""),
    "LLaVA": (_llava, "CLIPVisionModel", "model.vision_tower"),
    "TrOCR": (_trocr, "ViTModel", "encoder"),
    "OWL-ViT": (_owl_vit, "OwlViTVisionTransformer", "owlvit.vision_model"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_part_that_takes_images_alone(name: str, tmp_path: Path) -> None:
    build, loaded_class, part = MODELS[name]
    saved = randomize(build())
    saved.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (type(ours).__name__, ours.dtype) == (loaded_class, torch.float32)
    size = ours.preprocessing.size  # type: ignore[union-attr]
    with torch.no_grad():
        theirs = saved.float().get_submodule(part)(images(*size))
        assert torch.allclose(ours(images(*size))[0], theirs[0], atol=1e-5)
    assert len(mean_attention_distance(ours, images(*size)).to_dataframe()) == 16


def test_a_part_is_not_initialised_at_random(tmp_path: Path) -> None:
    _trocr().save_pretrained(tmp_path)
    change(tmp_path, remove="encoder.pooler.")
    assert load_model(tmp_path).pooler is None
    change(tmp_path, remove="encoder.layernorm.weight")
    with pytest.raises(InputError, match=r"do not fit VisionEncoderDecoderModel; missing: encoder\.layernorm\.weight"):
        load_model(tmp_path)


def test_a_class_of_another_configuration_is_not_taken(tmp_path: Path) -> None:
    """`architectures` is only a name in a file; the configuration's type decides."""
    config = transformers.BertConfig(**TEXT, architectures=["ViTModel"])
    transformers.BertModel(config).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("BertModel", "ViTModel"))
    with pytest.raises(InputError, match="type 'bert' does not take images alone: BertModel is called with input_ids"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("model", "config", "fields", "message"),
    [
        ("VideoMAEModel", "VideoMAEConfig", VISION | {"num_frames": 4}, r"takes videos \(num_frames=4\), not single images"),
        ("TimesformerModel", "TimesformerConfig", VISION, r"takes videos \(num_frames=8\)"),
        ("ViltModel", "ViltConfig", VISION | {"vocab_size": 50}, "ViltModel is called with input_ids"),
    ],
)
def test_models_that_take_something_else_say_what(
    model: str, config: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    getattr(transformers, model)(getattr(transformers, config)(**fields)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_a_processor_that_keeps_proportions_is_not_converted(tmp_path: Path) -> None:
    """Its images have another size for each photograph."""
    _depth_anything().save_pretrained(tmp_path)
    transformers.DPTImageProcessor(
        size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14
    ).save_pretrained(tmp_path)
    assert load_model(tmp_path).preprocessing is None
