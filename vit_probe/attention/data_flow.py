"""Which tensors were computed from which others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vit_probe.errors import InputError

__all__ = ["IMAGE", "DataFlow", "check_one_after_the_other"]

IMAGE = "image"


# A dispatch mode, since it sees every operation, also those without gradients, within TorchScript and in place. What it
# follows is the structure of the computation: a weight of zero or a LayerScale of 1e-5 hides nothing, as it would if the
# values were compared.
class DataFlow(TorchDispatchMode):
    """Follows marked tensors through all operations that run within the context.

    Examples:
        >>> import torch
        >>> with DataFlow() as flow:
        ...     image = flow.mark(torch.ones(2), "image")
        ...     tokens = flow.mark(3 * image, "layer 0")
        ...     output = image + 0 * tokens
        >>> sorted(flow.origins(output)), sorted(flow.origins(image))
        (['image', 'layer 0'], ['image'])
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By memory rather than by tensor: views share it, and what is written to one shows in the others. The weak references
        # keep an address from being used again, but not the memory itself.
        self._origins: dict[int, tuple[StorageWeakRef, frozenset[Any]]] = {}

    def mark(self, tensor: Tensor, label: Any) -> Tensor:
        """Return a copy of a tensor that is known as `label` from here on."""
        marked = tensor.clone()
        self._add(marked, self.origins(tensor) | {label})
        return marked

    def origins(self, *tensors: Tensor) -> frozenset[Any]:
        """Return the labels of all marked tensors from which these were computed."""
        memories = [memory for tensor in tensors if (memory := _memory(tensor)) is not None]
        return frozenset().union(*(self._origins[one.cdata][1] for one in memories if one.cdata in self._origins))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        origins = self.origins(*_tensors((args, kwargs)))
        if origins:
            for tensor in _tensors(result):
                self._add(tensor, origins)
        return result

    def _add(self, tensor: Tensor, origins: frozenset[Any]) -> None:
        memory = _memory(tensor)
        if memory is not None:
            known = self._origins[memory.cdata][1] if memory.cdata in self._origins else frozenset()
            self._origins[memory.cdata] = (memory, known | origins)


def _tensors(values: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _memory(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except NotImplementedError:  # sparse tensors and those of MKL-DNN
        return None


def check_one_after_the_other(layers: Sequence[str], origins: Mapping[int, frozenset[Any]]) -> None:
    """Check that each layer takes what the layer before it returned.

    Layers that run side by side are parts of one layer: neither the order of their rows nor the product of their maps means
    anything.

    Args:
        layers: Module path of each layer.
        origins: By layer number, of what its queries, keys and values were computed: numbers of layers, and `IMAGE`. A layer
            in which not even the image is found is not checked: its trace was lost, as it is in other libraries' arrays.

    Raises:
        InputError: If two layers run side by side.

    Examples:
        >>> check_one_after_the_other(["0.attn", "1.attn"], {0: frozenset({IMAGE}), 1: frozenset({IMAGE, 0})})
        >>> check_one_after_the_other(["attn", "attn"], {0: frozenset({IMAGE}), 1: frozenset({IMAGE})})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vit_probe.errors.InputError: attn attends more than once in a forward pass, ...
    """
    for layer in range(1, len(layers)):
        before, name = layers[layer - 1] or "the model itself", layers[layer] or "the model itself"
        if IMAGE not in origins[layer] or layer - 1 in origins[layer]:
            continue
        if name == before:
            raise InputError(
                f"{name} attends more than once in a forward pass, and each time without using the result of the time before: "
                "its attention is not one softmax (but the difference of two, or one in pieces, for example), so there is "
                "no attention map that could be measured"
            )
        raise InputError(
            f"{name} does not use the result of {before}: they attend side by side, so that neither is a layer that follows "
            "the other, and there is no one attention map of both that could be measured"
        )
