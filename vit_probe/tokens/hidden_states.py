"""Patch tokens between the blocks: shown to observers while the model runs (`token_hooks`) or returned (`patch_tokens`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vit_probe.attention.intercept import ForwardStopped, evaluation_mode
from vit_probe.errors import TokensNotFound
from vit_probe.tokens.branches import BranchSum, is_list
from vit_probe.tokens.grid import TokenGrid, first_parameter, first_tensor
from vit_probe.tokens.locate import TokenLayout
from vit_probe.tokens.patch_embedding import first_convolution

__all__ = ["TokenObserver", "block_path", "patch_tokens", "token_hooks"]


@runtime_checkable
class TokenObserver(Protocol):
    """An observer of hidden states: it is shown the patch tokens after each block, in the order of the layers.

    These are the tokens that a block passes on: after its residual connections and before the final normalisation, without
    prefix tokens. The tokens that enter the first block are not shown. The images come in order. In a model that merges
    patches, later layers have fewer tokens. The tensors are the model's own and must not be written to.

    Examples:
        >>> class MeanNorm:
        ...     def __init__(self):
        ...         self.by_layer = {}
        ...
        ...     def update_tokens(self, layer, tokens):
        ...         self.by_layer[layer] = tokens.norm(dim=-1).mean().item()
        >>> isinstance(MeanNorm(), TokenObserver)
        True
    """

    def update_tokens(self, layer: int, tokens: Float[Tensor, "image patch dim"]) -> None: ...


@contextmanager
def token_hooks(model: nn.Module, layout: TokenLayout, observers: Sequence[TokenObserver]) -> Iterator[None]:
    """Show the patch tokens after every block to `observers` while `model` runs inside the context.

    Each call of the model ends, with `ForwardStopped`, after the last block's tokens were shown. Without observers, nothing is
    hooked. All hooks are removed at the end, also after an exception.

    Args:
        model: Any Vision Transformer.
        layout: Result of `locate_tokens` for images of this size.
        observers: Called in turn with the tokens of each layer.

    Raises:
        TokensNotFound: On entering the context, if the model's blocks cannot be identified; while the model runs, if they do
            not pass the tokens on from one to the next.

    Examples:
        >>> from contextlib import suppress
        >>> import torch
        >>> from vit_probe import VisionTransformer, ViTConfig
        >>> from vit_probe.tokens.locate import locate_tokens
        >>> class Shapes:
        ...     def update_tokens(self, layer, tokens):
        ...         print(layer, tuple(tokens.shape))
        >>> model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
        >>> layout = locate_tokens(model, 32, 32)
        >>> with token_hooks(model, layout, [Shapes()]), suppress(ForwardStopped):
        ...     model(torch.randn(5, 3, 32, 32))
        0 (5, 16, 24)
        1 (5, 16, 24)
    """
    if not observers:
        yield
        return
    paths = [block_path(model, layout, layer) for layer in range(len(layout.layers))]
    hooks = _BlockHooks(layout, [path in layout.seq_first for path in paths], observers)
    handles = [model.register_forward_pre_hook(hooks.before_model, with_kwargs=True)]
    try:
        in_lists = {path: layer for layer, path in enumerate(paths) if is_list(model.get_submodule(path))}
        if in_lists:
            handles += hooks.follow_branches(model, in_lists)
        for layer, path in enumerate(paths):
            if path not in in_lists:
                after_block = partial(hooks.after_block, layer)
                handles.append(model.get_submodule(path).register_forward_hook(after_block, with_kwargs=True))
        handles.append(model.register_forward_hook(hooks.after_model))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _BlockHooks:
    """The hooks of `token_hooks`, and how far a forward pass has come."""

    def __init__(self, layout: TokenLayout, seq_first: Sequence[bool], observers: Sequence[TokenObserver]) -> None:
        self._layout = layout
        self._seq_first = seq_first
        self._observers = observers
        self._num_images = 0
        self._next_layer = 0
        self._previous: Tensor | None = None  # the output of the block before
        self._branches: BranchSum | None = None  # of the list of modules that is running

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        images = first_tensor((*args, *kwargs.values()))
        self._num_images = 0 if images is None else len(images)
        self._next_layer, self._previous, self._branches = 0, None, None

    def after_block(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        self._check_given(layer, first_tensor((*args, *kwargs.values())))
        self._show(layer, first_tensor(output))

    def follow_branches(self, model: nn.Module, in_lists: Mapping[str, int]) -> list[RemovableHandle]:
        """Hook the modules of the blocks that are lists, and all modules that may get what such a block passes on."""
        handles = []
        for path, module in model.named_modules():
            parent = path.rpartition(".")[0]
            if parent in in_lists:
                before = partial(self._before_branch, in_lists[parent])
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after_branch))
            elif not any(path.startswith(f"{block}.") for block in in_lists):
                handles.append(module.register_forward_pre_hook(self._before_other, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after_other))
        return handles

    def _before_branch(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = first_tensor((*args, *kwargs.values()))
        if self._branches is not None and self._branches.layer != layer:
            self._end_branches(given)
        if self._branches is None:
            self._check_given(layer, given)
            self._branches = BranchSum(layer, given)
        else:
            self._branches.enter(given)

    def _after_branch(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._branches is not None:
            self._branches.leave(first_tensor(output))

    def _before_other(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._branches is not None:
            self._end_branches(first_tensor((*args, *kwargs.values())))

    def _after_other(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._branches is not None:
            self._end_branches(first_tensor(output))

    def _end_branches(self, passed_on: Tensor | None) -> None:
        """Take what the model passes on after a list of modules, if that is what they make of the tokens."""
        branches, self._branches = self._branches, None
        assert branches is not None
        if not branches.makes(passed_on):
            raise TokensNotFound(
                f"what follows the modules around {self._layout.layers[branches.layer]} gets neither the sum of their outputs "
                "and the tokens nor the last of these outputs, so what passes from layer to layer is not known"
            )
        self._show(branches.layer, passed_on)

    def _check_given(self, layer: int, given: Tensor | None) -> None:
        # A module's output may be only a branch, which the model adds to the tokens itself (parallel attention in timm): it is
        # the tokens if the next block gets it.
        if layer != self._next_layer or not self._gets_previous_output(layer, given):
            raise TokensNotFound(
                f"the block around {self._layout.layers[layer]} does not take the tokens from the block before it, so that "
                "block's output is not what passes from layer to layer"
            )

    def _show(self, layer: int, tensor: Tensor | None) -> None:
        tokens = self._patches(layer, tensor)
        for observer in self._observers:
            observer.update_tokens(layer, tokens)
        self._next_layer, self._previous = layer + 1, tensor
        if self._next_layer == len(self._layout.layers):
            self._previous = None
            raise ForwardStopped

    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        # Only reached if not every block was called as a module: the last one ends the forward pass.
        name = self._layout.layers[self._next_layer]
        raise TokensNotFound(
            f"{type(module).__name__} does not call the block around {name} as a module, so its output cannot be observed"
        )

    def _patches(self, layer: int, tensor: Tensor | None) -> Float[Tensor, "image patch dim"]:
        return _select_patches(tensor, self._num_images, self._layout, layer, seq_first=self._seq_first[layer])

    def _gets_previous_output(self, layer: int, given: Tensor | None) -> bool:
        """Return whether a block got the patch tokens of the block before, as far as their shapes allow to compare."""
        previous = self._previous
        if given is None or previous is None or given is previous or given.shape != previous.shape:
            return True  # merged patches have another shape
        return torch.equal(self._patches(layer, given), self._patches(layer, previous))


def patch_tokens(
    model: nn.Module, images: Float[Tensor, "image channel height width"], layout: TokenLayout, after_layers: int
) -> tuple[Float[Tensor, "image patch dim"], TokenGrid]:
    """Return the patch tokens after the first `after_layers` layers, and their grid.

    With 0 layers these are the tokens that enter the first layer. They are taken between blocks: after a block's residual
    connections, before the final normalisation. The forward pass ends there.

    Args:
        model: Any Vision Transformer. It runs in evaluation mode and without gradients.
        images: On the CPU or the model's device.
        layout: Result of `locate_tokens` for images of this size.
        after_layers: From 0 to the number of layers.

    Raises:
        TokensNotFound: If the model's blocks cannot be identified, or their outputs are not the tokens.

    Examples:
        >>> import torch
        >>> from vit_probe import VisionTransformer, ViTConfig
        >>> from vit_probe.tokens.locate import locate_tokens
        >>> model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
        >>> tokens, grid = patch_tokens(model, torch.randn(5, 3, 32, 32), locate_tokens(model, 32, 32), after_layers=1)
        >>> tokens.shape
        torch.Size([5, 16, 24])
        >>> grid.rows, grid.cols
        (4, 4)
    """
    captured: list[Tensor] = []
    if after_layers > 0:
        observer = _TokensAfter(after_layers, captured)
        with evaluation_mode(model), token_hooks(model, layout, [observer]), suppress(ForwardStopped):
            model(images.to(first_parameter(model)))
        return captured[0], layout.grid_of(after_layers - 1)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if (given := first_tensor((*args, *kwargs.values()))) is not None:
            captured.append(given)
        raise ForwardStopped

    path = block_path(model, layout, 0)
    block = model.get_submodule(path)
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True)
        for module in (block.children() if is_list(block) else [block])
    ]
    try:
        with evaluation_mode(model), suppress(ForwardStopped):
            model(images.to(first_parameter(model)))
    finally:
        for handle in handles:
            handle.remove()
    tensor = captured[0] if captured else None
    return _select_patches(tensor, len(images), layout, 0, seq_first=path in layout.seq_first), layout.grid


class _TokensAfter:
    """Keeps the tokens after some layers, and ends the forward pass when the next block is known to have got them."""

    def __init__(self, after_layers: int, kept: list[Tensor]) -> None:
        self._after_layers = after_layers
        self._kept = kept

    def update_tokens(self, layer: int, tokens: Float[Tensor, "image patch dim"]) -> None:
        if layer == self._after_layers - 1:
            self._kept.append(tokens)
        elif layer == self._after_layers:
            raise ForwardStopped


def block_path(model: nn.Module, layout: TokenLayout, layer: int) -> str:
    """Return the path of the block around an attention layer, such as `blocks.0` around `blocks.0.attn`.

    It is the largest module that holds neither another attention layer nor the first convolution. It has a forward pass
    of its own, or it is a list in a list, such as `layers.0` of `layers.0.0` (the attention) and `layers.0.1` (the MLP): then
    the model itself adds their outputs to the tokens. In a model of one layer, where the largest module may include the final
    normalisation, it is the largest such module that is the only entry of a list, if there is any.

    Raises:
        TokensNotFound: If there is none: one module is called for several layers, or the model calls the attention itself.
    """
    path = layout.layers[layer]
    stem, convolution = first_convolution(model)
    others = [*layout.layers[:layer], *layout.layers[layer + 1 :], *layout.skipped, *([stem] if convolution else [])]
    parts = path.split(".") if path else []
    candidates = []
    for length in range(1, len(parts) + 1):
        ancestor = ".".join(parts[:length])
        if _may_be_block(model, ancestor) and not any(f"{other}.".startswith(f"{ancestor}.") for other in others):
            candidates.append(ancestor)
    if len(layout.layers) == 1:
        in_lists = [path for path in candidates if _is_list_of_one(model.get_submodule(path.rpartition(".")[0]))]
        candidates = in_lists or candidates
    if candidates:
        return candidates[0]
    raise TokensNotFound(f"layer {layer} ({path or 'the model itself'}) of {type(model).__name__} has no block of its own")


def _may_be_block(model: nn.Module, path: str) -> bool:
    """Return whether a module has a forward pass of its own, or is a list of several modules in a list."""
    module = model.get_submodule(path)
    return not is_list(module) or (len(list(module.children())) > 1 and is_list(model.get_submodule(path.rpartition(".")[0])))


def _is_list_of_one(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == 1


def _select_patches(
    tensor: Tensor | None, num_images: int, layout: TokenLayout, layer: int, *, seq_first: bool
) -> Float[Tensor, "image patch dim"]:
    """Return the patch tokens in a block's output, whichever way it arranges images, tokens, rows and columns.

    Args:
        tensor: The output of the block.
        num_images: Images in the batch.
        layout: Result of `locate_tokens` for images of this size.
        layer: The layer inside the block.
        seq_first: Whether the tokens come before the images, which the shape does not tell if there are as many of both.

    Raises:
        TokensNotFound: If the shape does not fit the layer's grid.
    """
    grid = layout.grid_of(layer)
    shape = None if tensor is None else tuple(tensor.shape)
    if tensor is not None and shape is not None:
        if shape[:3] == (num_images, grid.rows, grid.cols) and len(shape) == 4:
            return tensor.flatten(1, 2)
        tokens = tensor.transpose(0, 1) if seq_first and len(shape) == 3 else tensor
        if len(shape) == 3 and tokens.shape[:2] == (num_images, grid.num_tokens):
            return tokens[:, grid.patch_tokens]
    raise TokensNotFound(
        f"the block around {layout.layers[layer]} returns a tensor of shape {shape}, which does not hold the tokens of {grid}"
    )
