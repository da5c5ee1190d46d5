"""token_hooks: the patch tokens after every block, in the forward pass in which attention is observed."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.test_hooks import leaves_nothing
from tests.example_models import FAMILIES, Family, Hungry, images, small_vit, swin
from tests.families.timm import sam as timm_sam
from tests.families.timm import swin as timm_swin
from tests.runner.test_distributed import start, wait_for
from tests.tokens.test_patch_tokens import SeqFirst
from vit_probe import InputError, mean_attention_distance
from vit_probe.errors import AssumptionWarning
from vit_probe.measures.base.hidden_states import HiddenStateMeasure
from vit_probe.measures.representation_similarity import RepresentationSimilarity
from vit_probe.measures.rollout import AttentionRollout
from vit_probe.measures.token_norms import token_norms
from vit_probe.runner.protocol import Measure
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.hidden_states import TokenObserver, token_hooks
from vit_probe.tokens.locate import locate_tokens


class Tokens:
    """Records the tokens of every layer of all images, and the order of the layers."""

    def __init__(self) -> None:
        self.layers: dict[int, list[np.ndarray]] = {}
        self.order: list[int] = []

    def update(self, tile: Any) -> None:
        pass

    def update_tokens(self, layer: int, tokens: Tensor) -> None:
        assert not tokens.requires_grad
        self.layers.setdefault(layer, []).append(tokens.numpy().copy())
        self.order.append(layer)

    def of(self, layer: int) -> np.ndarray:
        return np.concatenate(self.layers[layer])


def run(model: nn.Module, x: Any, **options: Any) -> AttentionRun:
    return AttentionRun(model, x, device="cpu", **options)


def literal(name: str, model: Any, x: Tensor) -> list[Tensor]:
    """All tokens after each block, from the library itself or by calling block after block."""
    if name.startswith("timm"):
        passed = model.forward_intermediates(
            x, norm=False, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in passed] if isinstance(passed[0], tuple) else passed
    if name.startswith("transformers"):
        return list(model(x, output_hidden_states=True).hidden_states[1:])
    passed = []
    if name == "ours":
        tokens, blocks = model._embed(x), model.blocks
    elif name == "torchvision":
        tokens = model._process_input(x)
        tokens = torch.cat([model.class_token.expand(len(x), -1, -1), tokens], dim=1) + model.encoder.pos_embedding
        blocks = model.encoder.layers
    else:
        tokens, blocks = model.proj(x).flatten(2).mT, model.encoder.layers
    for block in blocks:
        tokens = block(tokens)
        passed.append(tokens)
    return passed


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_every_family(name: str) -> None:
    family: Family = FAMILIES[name]
    model, x = family.model(), family.images(5)
    with torch.no_grad():
        expected = literal(name, model, x)
    assert len(expected) == 2
    assert float((expected[0] - expected[1]).abs().mean()) > 0.05
    model = family.model()  # without the hooks that a library sets to return such output
    attention = run(model, x, batch_size=2)
    with leaves_nothing(model):
        attention.observe(recorded := Tokens())
    assert recorded.order == [0, 1] * 3
    for layer, tokens in enumerate(expected):
        patches = tokens[:, -family.grid.num_patches :].numpy()
        np.testing.assert_allclose(recorded.of(layer), patches, rtol=0, atol=1e-5 * np.abs(patches).max())


@pytest.mark.parametrize(("build", "size", "lasts"), [(timm_sam, (40, 56), [0, 1, 2]), (timm_swin, (28, 44), [1, 3])])
def test_layers_with_windows_or_merged_patches(
    build: Callable[..., nn.Module], size: tuple[int, int], lasts: list[int]
) -> None:
    """Row by row, whatever the windows, and fewer where patches were merged."""
    torch.manual_seed(0)
    model, x = build(size).eval(), images(*size)
    with torch.no_grad():
        maps = model.forward_intermediates(x, norm=False, output_fmt="NCHW", intermediates_only=True)
    run(model, x).observe(recorded := Tokens())
    for layer, expected in zip(lasts, maps, strict=True):
        np.testing.assert_allclose(recorded.of(layer), expected.flatten(2).mT.numpy(), rtol=0, atol=1e-5)


def test_merged_patches_of_transformers() -> None:
    model, x = swin(), images(48, 48)
    passed = []
    for stage in model.encoder.layers:
        for block in stage.blocks:
            block.register_forward_hook(lambda module, args, output: passed.append(output))
    with torch.no_grad():
        model(x)
    expected = [output[0] if isinstance(output, tuple) else output for output in passed]
    run(model, x).observe(recorded := Tokens())
    assert [recorded.of(layer).shape[1] for layer in range(4)] == [144, 144, 36, 36]
    for layer, tokens in enumerate(expected):
        np.testing.assert_allclose(recorded.of(layer), tokens.numpy(), rtol=0, atol=1e-5)


def test_tokens_before_images() -> None:
    """Also if a batch has as many images as there are tokens (nine), so that the shape does not tell which come first."""
    torch.manual_seed(0)
    model, x = SeqFirst().eval(), images(batch=20)
    with torch.no_grad():
        expected = model(x).transpose(0, 1)
    run(model, x, batch_size=9).observe(recorded := Tokens())
    np.testing.assert_allclose(recorded.of(1), expected.numpy(), rtol=0, atol=1e-5)


# One pass for attention and tokens, which ends as early as it can


def test_tokens_and_attention_in_one_pass() -> None:
    model, x = small_vit(depth=3), images(batch=5)
    alone = mean_attention_distance.observer(model.token_grid(24, 24))
    run(model, x, batch_size=2).observe(alone)
    attention = run(model, x, batch_size=2)
    calls = {"first": 0, "last": 0, "norm": 0}
    for name, module in (("first", model.blocks[0]), ("last", model.blocks[2].mlp), ("norm", model.norm)):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    beside = mean_attention_distance.observer(attention.grid)
    attention.observe(beside, recorded := Tokens())
    assert calls == {"first": 3, "last": 3, "norm": 0}
    np.testing.assert_allclose(beside.compute().distance, alone.compute().distance, rtol=1e-6)
    assert recorded.of(2).shape == (5, 12, 16)


def test_without_other_measures_no_attention_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_vit(), images()
    attention = run(model, x)
    monkeypatch.setattr("vit_probe.attention.hooks.TiledAttention.__call__", lambda *_: pytest.fail("attention was computed"))
    attention.observe(measure := token_norms.spec.start(attention))
    assert measure.compute().num_images == 3


def test_measures_of_tokens_are_measures() -> None:
    measure = token_norms.spec.start(run(small_vit(), images()))
    assert isinstance(measure, TokenObserver)
    assert isinstance(measure, Measure)
    assert not isinstance(mean_attention_distance.observer(small_vit().token_grid(24, 24)), TokenObserver)


def test_training_mode_and_gradients_are_left_alone() -> None:
    model, x = small_vit(dropout=0.5).train(), images()
    first, again = Tokens(), Tokens()
    for recorded in (first, again):
        run(model, x).observe(recorded)
    np.testing.assert_array_equal(first.of(1), again.of(1))
    assert model.training


def test_half_precision_and_compiled_models() -> None:
    model, x = small_vit(), images()
    run(model, x).observe(expected := Tokens())
    run(torch.compile(model, backend="eager"), x).observe(recorded := Tokens())
    np.testing.assert_allclose(recorded.of(1), expected.of(1), rtol=0, atol=1e-5)
    torch.compiler.reset()
    attention = run(model.to(torch.bfloat16), x)
    attention.observe(measure := token_norms.spec.start(attention))
    norms = np.linalg.norm(expected.of(1), axis=-1)
    assert measure.compute().to_dataframe()["median"][1] == pytest.approx(np.median(norms), rel=0.05)


# Memory, interruptions, processes


def test_batches_are_not_split_below_what_a_measure_needs() -> None:
    """Unless even that runs out of memory: then the other measures continue, or the run ends if there are none."""
    x = images(batch=21)
    model = Hungry(5)
    attention = run(model, x, batch_size=9)
    model.sizes.clear()
    norms, similarity = token_norms.spec.start(attention), RepresentationSimilarity(attention.layers)
    with pytest.warns(AssumptionWarning, match="out of memory with a batch of 9 images"):
        attention.observe(norms, similarity)
    assert model.sizes == [9, 5, 4, 5, 4, 3]  # pieces of equal size, so that the last one is not too small
    result = similarity.compute()
    assert (result.num_images, result.num_left_out, norms.compute().num_images) == (18, 3, 21)

    model = Hungry(3)
    attention = run(model, x, batch_size=9)
    norms, similarity = token_norms.spec.start(attention), RepresentationSimilarity(attention.layers)
    with pytest.warns(
        AssumptionWarning, match="out of memory with a batch of 4 images; measures that need at least 4 images per batch"
    ):
        attention.observe(norms, similarity)
    assert norms.compute().num_images == 21
    with pytest.raises(InputError, match="21 images came in smaller ones"):
        similarity.compute()

    model.sizes.clear()
    message = (
        "out of memory with a batch of 4 images, but every measure needs at least 4 images per batch; use a device with more"
    )
    with pytest.raises(InputError, match=message):
        run(model, x, batch_size=4).observe(RepresentationSimilarity(attention.layers))
    assert model.sizes[-1] == 4
    attention.observe()  # nothing


def test_split_interrupted_and_resumed(tmp_path: Path) -> None:
    """Batches are split as in a run that was not interrupted, since the similarity depends on the batches."""
    x, state = list(images(batch=48).split([13, 9, 13, 13])), tmp_path / "state"

    def stop(count: int) -> None:
        if state.exists():
            raise KeyboardInterrupt

    whole, first, again = (run(Hungry(6), x) for _ in range(3))
    whole.observe(expected := RepresentationSimilarity(whole.layers))
    with pytest.raises(KeyboardInterrupt):
        first.observe(RepresentationSimilarity(first.layers), progress=stop, state=state, every=1)
    again.observe(measure := RepresentationSimilarity(again.layers), state=state)
    assert measure.compute().num_batches == expected.compute().num_batches
    np.testing.assert_allclose(measure.compute().similarity, expected.compute().similarity, rtol=1e-9)


def measured(model: nn.Module, x: Any, **options: Any) -> np.ndarray:
    attention = run(model, x, **options)
    attention.observe(measure := token_norms.spec.start(attention))
    return measure.state()["counts"]


def test_batches_that_run_out_of_memory_are_split() -> None:
    x, model = images(batch=19), Hungry(2)
    attention = run(model, x, batch_size=8)
    model.sizes.clear()
    norms, rollout = token_norms.spec.start(attention), AttentionRollout(attention.grid)
    with pytest.warns(AssumptionWarning, match="out of memory with a batch of 8 images"):
        attention.observe(rollout, norms)
    assert model.sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]
    assert norms.compute().num_images == 19
    assert np.abs(norms.state()["counts"] - measured(small_vit(), x)).sum() <= 4  # tokens at the edge of a bin
    assert rollout.compute().maps.shape[0] == 19


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    x, state = images(batch=11), tmp_path / "state"

    class Interrupts:
        total = 0

        def __call__(self, count: int) -> None:
            self.total += count
            if self.total == 6:
                raise KeyboardInterrupt

    first = run(small_vit(), x, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        first.observe(token_norms.spec.start(first), progress=Interrupts(), state=state, every=1)
    again = run(small_vit(), x, batch_size=2)
    counts: list[int] = []
    again.observe(measure := token_norms.spec.start(again), progress=counts.append, state=state)
    assert counts[0] == 6
    np.testing.assert_array_equal(measure.state()["counts"], measured(small_vit(), x, batch_size=2))
    assert measure.compute().num_images == 11


SHARE = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
from tests.example_models import images, small_vit
from vit_probe.measures.representation_similarity import RepresentationSimilarity
from vit_probe.measures.token_norms import token_norms
from vit_probe.runner.distributed import ProcessGroup
from vit_probe.runner.run import AttentionRun
processes = ProcessGroup.from_env()
attention = AttentionRun(small_vit(), images(batch=13), batch_size=4, device="cpu", processes=processes)
norms, similarity = token_norms.spec.start(attention), RepresentationSimilarity(attention.layers, keep=True)
attention.observe(norms, similarity)
if processes.is_main:
    np.savez(sys.argv[1], counts=norms.state()["counts"], similarity=similarity.compute().similarity)
processes.destroy()
"""


def test_two_processes_share_the_images(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    started = [start(tmp_path, sys.executable, "-c", SHARE, tmp_path / "shared.npz", RANK=rank, **others) for rank in range(2)]
    assert [(end.code, end.err) for end in wait_for(*started)] == [(0, "")] * 2
    together = np.load(tmp_path / "shared.npz")
    x = images(batch=13)
    assert np.abs(together["counts"] - measured(small_vit(), x)).sum() <= 4
    shares = [x[0::2][:4], x[1::2][:4]]  # the remaining images come in batches of 3 and 2
    attention = run(small_vit(), shares)
    attention.observe(expected := RepresentationSimilarity(attention.layers))
    np.testing.assert_allclose(together["similarity"], expected.compute().similarity, atol=1e-6)


# Errors


class Fails(Tokens):
    def update_tokens(self, layer: int, tokens: Tensor) -> None:
        raise RuntimeError("broken")


def test_all_hooks_are_removed_after_an_error() -> None:
    model = small_vit()
    attention = run(model, images())
    with leaves_nothing(model), pytest.raises(RuntimeError, match="broken"):
        attention.observe(Fails())


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


class Model(nn.Module):
    """A patch embedding, and blocks that a subclass calls."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.blocks = nn.Conv2d(3, 16, 8, 8), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.through(self.patch_embed(x).flatten(2).mT)


class Shared(Model):
    def through(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.blocks[0](x))


class Direct(Model):
    def through(self, x: Tensor) -> Tensor:
        x = x + self.blocks[0](x)
        return x + self.blocks[1][1](self.blocks[1][0](x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Shared(Attention()), r"layer 0 \(blocks.0\) of Shared has no block of its own"),
        (Direct(Attention(), nn.ModuleList([nn.Identity(), Attention()])), "the block around blocks.1.1 does not take the tok"),
        (
            Direct(Attention(), nn.Sequential(nn.Identity(), Attention())),
            "Direct does not call the block around blocks.1.1 as a module",
        ),
    ],
)
def test_blocks_whose_outputs_are_not_the_tokens(model: nn.Module, message: str) -> None:
    attention = run(model, images())
    with leaves_nothing(model), pytest.raises(InputError, match=message):
        attention.observe(Tokens())


def test_blocks_that_return_something_else() -> None:
    class Summed(Model):
        def through(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x).sum(1)

    with pytest.raises(InputError, match=r"the block around blocks.0.attn returns a tensor of shape \(3, 16\), which d"):
        run(Summed(Sum()), images()).observe(Tokens())


def test_nothing_is_hooked_without_observers() -> None:
    model = Shared(Attention())  # whose layers share one block
    with token_hooks(model, locate_tokens(model, 24, 24), []):
        model(images())


class Counts(HiddenStateMeasure):
    """The sum over a layer's tokens."""

    display_name = "sums"
    options: dict[str, Any] = {}  # noqa: RUF012
    total = 0.0

    def _reduced(self, tokens: Tensor) -> np.ndarray:
        return tokens.sum().numpy()

    def _add(self, batch: list[np.ndarray], images: int) -> None:
        self.total += float(np.sum(batch)) * images


def test_layers_come_in_order_and_count_when_the_batch_is_complete() -> None:
    measure = Counts(["a", "b"])
    measure.begin_batch()
    measure.update_tokens(0, torch.ones(2, 3, 4))
    with pytest.raises(InputError, match="tokens of layer 0 came after those of 1 layers, and sums are of 2 layers; show all"):
        measure.update_tokens(0, torch.ones(2, 3, 4))
    with pytest.raises(InputError, match="sums need the tokens of 2 layers, but those of 1 came; show them within"):
        measure.end_batch()
    for _ in range(2):
        measure.begin_batch()
        measure.update_tokens(0, torch.ones(2, 3, 4))
        measure.update_tokens(1, torch.ones(2, 3, 4))
        measure.roll_back() if measure.total else measure.end_batch()
    assert measure.total == 2 * 2 * 24
    with pytest.raises(InputError, match="tokens of layer 5 came"):
        measure.update_tokens(5, torch.ones(2, 3, 4))
