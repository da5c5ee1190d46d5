"""Similarity of position embeddings against the literal reference, for every kind of table."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from torch import nn

from tests import reference
from tests.checkpoints.parity import randomize
from tests.example_models import FAMILIES, small_vit
from vit_probe import InputError, load_model, load_result, position_similarity
from vit_probe.measures import PositionSimilarityResult
from vit_probe.measures.position_similarity import position_nearness

TABLES = {
    "ours": "pos_embed",
    "timm": "pos_embed",
    "timm-registers": "pos_embed",
    "timm-gap": "pos_embed",
    "timm-eva02": "pos_embed",
    "transformers-vit": "embeddings.position_embeddings",
    "transformers-siglip": "embeddings.position_embedding.weight",
    "torchvision": "encoder.pos_embedding",
}


def agrees(result: PositionSimilarityResult, table: torch.Tensor, rows: int, cols: int) -> None:
    expected = reference.position_similarity(table.detach().double().numpy(), rows, cols)
    assert result.similarity.shape == (rows, cols, rows, cols)
    np.testing.assert_allclose(result.similarity, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.05


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_library(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    tables = [parameter for path, parameter in model.named_parameters() if path.endswith(TABLES[name])]
    table = tables[0].reshape(-1, tables[0].shape[-1])
    prefix = len(table) - family.grid.num_patches
    assert prefix in (0, family.grid.num_prefix_tokens)
    agrees(position_similarity(model), table[prefix:], family.grid.rows, family.grid.cols)


def test_the_native_grid_of_a_table_is_used() -> None:
    model = FAMILIES["transformers-dinov2"].model()  # native images of 32 x 32 pixels
    agrees(position_similarity(model), model.embeddings.position_embeddings[0, 1:], 4, 4)


@pytest.mark.parametrize("options", [{}, {"num_registers": 2}, {"num_registers": 2, "position_prefix": 1}])
def test_our_learned_table(options: dict) -> None:
    model = small_vit(**options)
    agrees(position_similarity(model), model.pos_embed[0, -12:], 3, 4)


def test_our_learned_row_and_column_tables() -> None:
    model = small_vit(position="learned_2d")
    row, col = model.pos_embed.row[0], model.pos_embed.col[0]
    table = torch.stack([torch.cat([col[c], row[r]]) for r in range(3) for c in range(4)])
    agrees(position_similarity(model), table, 3, 4)


def test_our_sine_cosine_table() -> None:
    from vit_probe import VisionTransformer, ViTConfig

    model = VisionTransformer(
        ViTConfig(image_size=(24, 32), patch_size=8, embed_dim=16, depth=1, num_heads=2, position="sincos_2d")
    )
    result = position_similarity(model)
    agrees(result, torch.tensor(reference.sincos_2d(3, 4, 16)), 3, 4)
    # Stationary: it depends on the offset alone.
    np.testing.assert_allclose(result.similarity[0, 0, 1, 2], result.similarity[1, 1, 2, 3], atol=1e-6)


def test_a_resized_model_is_measured_as_resized() -> None:
    model = small_vit().resize((40, 12))
    agrees(position_similarity(model), model.pos_embed[0, 1:], 5, 2)


class Clip(nn.Module):
    """The names and the structure of open_clip's vision transformer, whose tokens are normalised after the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = (16, 24)
        self.conv1 = nn.Conv2d(3, 8, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(8))
        self.positional_embedding = nn.Parameter(torch.randn(7, 8))
        self.ln_pre = nn.LayerNorm(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(images).flatten(2).mT
        tokens = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], dim=1)
        return self.layer(self.ln_pre(tokens + self.positional_embedding))


def test_the_table_of_open_clip() -> None:
    model = Clip()
    agrees(position_similarity(model), model.positional_embedding[1:], 2, 3)


def test_a_row_that_is_shared_by_all_patches_counts() -> None:
    from transformers import VitPoseBackbone, VitPoseBackboneConfig

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=[64, 48], patch_size=[16, 16])
    model = randomize(VitPoseBackbone(VitPoseBackboneConfig(**sizes)).eval())
    table = model.embeddings.position_embeddings[0]
    result = position_similarity(model)
    agrees(result, table[1:] + table[:1], 4, 3)
    assert (
        abs(
            result.similarity.reshape(12, 12) - reference.position_similarity(table[1:].detach().numpy(), 4, 3).reshape(12, 12)
        ).max()
        > 0.1
    )


def test_entries_of_detection_tokens_do_not_count() -> None:
    from transformers import YolosConfig, YolosModel

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=[32, 48], patch_size=8)
    model = randomize(YolosModel(YolosConfig(**sizes, num_detection_tokens=5)).eval())
    agrees(position_similarity(model), model.embeddings.position_embeddings[0, 1:25], 4, 6)


def test_a_table_that_is_stored_block_by_block() -> None:
    from timm.models.nest import Nest, deblockify

    sizes = dict(img_size=32, patch_size=2, num_levels=3, embed_dims=(8, 16, 32), num_heads=(1, 2, 4), depths=(1, 1, 1))
    model = randomize(Nest(**sizes, num_classes=2).eval())
    table = deblockify(model.levels[0].pos_embed, 4)[0].flatten(0, 1)
    agrees(position_similarity(model), table, 16, 16)


def test_a_model_that_names_no_size_is_made_for_the_given_one() -> None:
    model = Clip()
    table = model.positional_embedding[1:]
    model.image_size = None
    agrees(position_similarity(model, image_size=(16, 24)), table, 2, 3)


def test_similarity_is_symmetric_with_ones_on_its_diagonal() -> None:
    similarity = position_similarity(small_vit()).similarity.reshape(12, 12)
    np.testing.assert_array_equal(similarity, similarity.T)
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-6)
    assert abs(similarity).max() <= 1


def test_an_empty_entry_is_similar_to_nothing() -> None:
    model = small_vit()
    with torch.no_grad():
        model.pos_embed[0, 3] = 0
    similarity = position_similarity(model).similarity
    assert (similarity[0, 2] == 0).all()
    assert np.isfinite(similarity).all()


# The tokens of a constant image


def centred(vectors: torch.Tensor, rows: int, cols: int) -> np.ndarray:
    array = vectors.detach().double().numpy()
    return reference.position_similarity(array - array.mean(axis=0), rows, cols)


@pytest.mark.parametrize("name", TABLES)
def test_before_the_first_layer_only_the_table_distinguishes_tokens(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    tables = [parameter for path, parameter in model.named_parameters() if path.endswith(TABLES[name])]
    table = tables[0].reshape(-1, tables[0].shape[-1])[-family.grid.num_patches :]
    result = position_similarity(model, after_layers=0)
    expected = centred(table, family.grid.rows, family.grid.cols)
    np.testing.assert_allclose(result.similarity, expected, rtol=0, atol=1e-5)
    assert abs(result.similarity - position_similarity(model).similarity).max() > 0.01  # the table itself is not centred


@pytest.mark.parametrize("after_layers", [0, 1, 2])
@pytest.mark.parametrize("name", ["transformers-vit", "transformers-registers", "transformers-siglip"])
def test_tokens_are_the_hidden_states_of_transformers(name: str, after_layers: int) -> None:
    family = FAMILIES[name]
    model = family.model()
    states: list[torch.Tensor] = []
    blocks = model.layers if name == "transformers-vit" else model.encoder.layer if "reg" in name else model.encoder.layers
    blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: states.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: states.append(output))
    with torch.no_grad():
        model(torch.zeros(1, 3, *family.size))
    tokens = states[after_layers][0, family.grid.num_prefix_tokens :]
    expected = centred(tokens, family.grid.rows, family.grid.cols)
    result = position_similarity(model, after_layers=after_layers, image_size=family.size)
    np.testing.assert_allclose(result.similarity, expected, rtol=0, atol=1e-5)
    assert result.after_layers == after_layers
    assert not any(module._forward_pre_hooks for module in blocks[1:])


@pytest.mark.parametrize("name", ["timm-dinov3", "timm-beit"])
def test_rotary_and_relative_positions_show_in_the_middle_of_the_model(name: str) -> None:
    model = FAMILIES[name].model()
    result = position_similarity(model)
    assert result.after_layers == 1
    assert result.similarity.shape == (4, 6, 4, 6)
    states: list[torch.Tensor] = []
    model.blocks[0].register_forward_hook(lambda module, args, output: states.append(output))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 48))
    tokens = states[0][0, model.num_prefix_tokens :]
    np.testing.assert_allclose(result.similarity, centred(tokens, 4, 6), rtol=0, atol=1e-5)


def test_another_size_for_the_constant_image() -> None:
    model = small_vit(num_registers=2)
    result = position_similarity(model, after_layers=1, image_size=(40, 12))
    assert result.similarity.shape == (5, 2, 5, 2)
    assert position_similarity(model, image_size=(40, 12)).after_layers == 1
    square = position_similarity(model, after_layers=1, image_size=24)
    np.testing.assert_array_equal(square.similarity, position_similarity(model, after_layers=1).similarity)


def test_merged_patches_have_their_own_grid() -> None:
    from transformers import SwinConfig, SwinModel

    sizes = dict(image_size=32, patch_size=4, window_size=3, embed_dim=16, depths=[2, 2], num_heads=[1, 2])
    model = randomize(SwinModel(SwinConfig(**sizes, use_absolute_embeddings=True)).eval())
    for after_layers, side in enumerate((8, 8, 8, 4, 4)):
        result = position_similarity(model, after_layers=after_layers)
        assert result.similarity.shape == (side, side, side, side)
    assert position_similarity(model).similarity.shape == (8, 8, 8, 8)


def test_the_title_says_what_is_compared() -> None:
    model = small_vit()
    assert position_similarity(model).title == "Position embedding similarity"
    assert position_similarity(model, after_layers=1).title.endswith("after 1 layer")
    axes = position_similarity(model, after_layers=2).plot()
    assert axes.get_title() == "Position similarity after 2 layers"


def test_the_number_of_layers_is_saved(tmp_path) -> None:
    result = position_similarity(small_vit(), after_layers=2)
    again = load_result(result.save(tmp_path / "positions.safetensors"))
    assert isinstance(again, PositionSimilarityResult)
    assert again.after_layers == 2
    assert again.provenance["options"] == {"after_layers": 2, "image_size": None}


# The result


def test_dataframe_has_one_row_per_pair() -> None:
    result = position_similarity(small_vit())
    frame = result.to_dataframe()
    assert list(frame) == ["row", "col", "other_row", "other_col", "similarity"]
    assert len(frame) == 144
    for row, col, other_row, other_col in ((0, 0, 0, 0), (2, 1, 0, 3), (1, 3, 2, 2)):
        query = (frame.row == row) & (frame.col == col) & (frame.other_row == other_row) & (frame.other_col == other_col)
        assert frame[query].similarity.tolist() == [result.similarity[row, col, other_row, other_col]]


def test_summary_of_neighbours() -> None:
    result = position_similarity(small_vit())
    s = result.similarity
    pairs = [s[r, c, r, c + 1] for r in range(3) for c in range(3)] + [s[r, c, r + 1, c] for r in range(2) for c in range(4)]
    (row,) = result.summary().to_dict("records")
    assert row["grid"] == "3 x 4"
    assert row["neighbours"] == pytest.approx(np.mean(pairs), rel=1e-5)
    assert row["all pairs"] == pytest.approx(s.mean())
    assert row["lowest"] == s.min()


def test_summary_of_a_single_patch() -> None:
    result = position_similarity(small_vit(image_size=(8, 6)))
    assert np.isnan(result.summary().neighbours[0])


def test_plot_returns_axes() -> None:
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert position_similarity(small_vit()).plot(ax=ax) is ax
    assert isinstance(position_similarity(small_vit()).plot(), Axes)


def test_saved_and_read_back(tmp_path) -> None:
    result = position_similarity(small_vit())
    again = load_result(result.save(tmp_path / "positions.safetensors"))
    assert isinstance(again, PositionSimilarityResult)
    np.testing.assert_array_equal(again.similarity, result.similarity)
    assert again.provenance == result.provenance
    assert again.provenance["grid"] == {"rows": 3, "cols": 4}
    assert again.provenance["model"]["class"] == "VisionTransformer"


# Errors


def test_positions_that_leave_no_trace() -> None:
    for model in (small_vit(position="none"), FAMILIES["encoder"].model()):
        with pytest.raises(InputError, match=r"all alike after 1 layer of .*its positions leave no trace on them"):
            position_similarity(model, image_size=(24, 24))
    with pytest.raises(InputError, match="all alike after 0 layers of Eva; positions come in later: raise after_layers"):
        position_similarity(FAMILIES["timm-dinov3"].model(), after_layers=0)


@pytest.mark.parametrize("after_layers", [-1, 3])
def test_layers_that_are_not_there(after_layers: int) -> None:
    with pytest.raises(InputError, match=f"after_layers must be from 0 to 2, the layers of Eva; got {after_layers}"):
        position_similarity(FAMILIES["timm-dinov3"].model(), after_layers=after_layers)


def test_a_model_that_names_no_size() -> None:
    with pytest.raises(InputError, match=r"Encoder names no image size; pass image_size="):
        position_similarity(FAMILIES["encoder"].model())


def test_a_table_that_is_too_short() -> None:
    model = Clip()
    model.image_size = (32, 32)
    with pytest.raises(
        InputError, match=r"Clip cannot take images of 32 x 32 pixels .*; pass images of the size that it was made for"
    ):
        position_similarity(model)


# position_nearness: the correlation of similarity with distance


def literal_nearness(similarity: np.ndarray) -> float:
    """Pair by pair, with the standard library."""
    rows, cols = similarity.shape[:2]
    places = [(row, col) for row in range(rows) for col in range(cols)]
    pairs = [(one, other) for one in places for other in places if one != other]
    return statistics.correlation(
        [math.dist(*pair) for pair in pairs], [float(similarity[one + other]) for one, other in pairs]
    )


def falling_with_distance(rows: int, cols: int) -> np.ndarray:
    """Similarity 1 less a tenth of the distance."""
    places = np.indices((rows, cols)).reshape(2, -1).T
    return (1 - 0.1 * np.linalg.norm(places[:, None] - places[None], axis=-1)).reshape(rows, cols, rows, cols)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), cols=st.integers(3, 5), seed=st.integers(0, 99))
def test_nearness_pair_by_pair(rows: int, cols: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).uniform(-1, 1, (rows, cols, rows, cols))
    assert position_nearness(similarity) == pytest.approx(literal_nearness(similarity), abs=1e-12)


def test_nearness_closed_forms() -> None:
    assert position_nearness(falling_with_distance(3, 5)) == pytest.approx(-1)
    assert position_nearness(-falling_with_distance(3, 5)) == pytest.approx(1)
    wrong_of_itself = falling_with_distance(3, 5)
    np.einsum("rcrc->rc", wrong_of_itself)[:] = -9  # a patch and itself are not a pair
    assert position_nearness(wrong_of_itself) == pytest.approx(-1)


def test_nearness_of_the_bundled_model() -> None:
    similarity = position_similarity(load_model("demo")).similarity
    assert position_nearness(similarity) == pytest.approx(-0.71, abs=0.005)  # its card


def test_nearness_errors() -> None:
    with pytest.raises(InputError, match=r"similarity has shape \(9, 9\); it must be \(row, col, row, col\)"):
        position_nearness(np.eye(9))
    with pytest.raises(InputError, match="all pairs of the 3 x 3 patches are equally far apart or equally similar"):
        position_nearness(np.full((3, 3, 3, 3), 0.5))
    for shape in ((1, 1, 1, 1), (1, 2, 1, 2)):
        with pytest.raises(InputError, match="needs pairs that differ in both"):
            position_nearness(np.random.default_rng(0).uniform(size=shape))
