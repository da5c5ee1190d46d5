"""Attention sinks: how much attention each prefix token and the most attended patch receive."""

from __future__ import annotations

from torch import Tensor

from vit_probe.measures.base.head_measure import head_measure
from vit_probe.measures.base.reduce import ReceivedAttention

__all__ = ["attention_sinks"]


@head_measure(unit="share", reference="arXiv:2402.17762", attention="received")
def attention_sinks(received: ReceivedAttention) -> dict[str, Tensor]:
    """Share of all attention that single tokens receive, for every layer and head.

    A token j receives the mean over query patches i of a_ij. Reported are the patch that receives most, image by image, and
    each prefix token (class token, registers) in its place; the means are over images. A few tokens that take most of the
    attention are sinks: they carry little local information, and heads attend to them where they have nothing to add.

    The papers look at single images and at the attention of all tokens; here only patches are queries, as in the other
    measures of this package.

    Returns:
        A `HeadResult`: `top_patch`, the share of the most attended patch, with its spread over images; `prefix_0`, `prefix_1`,
        ... of each prefix token, in their order; `uniform_top_patch`, the share of any token under
        uniform attention.

    Raises:
        InputError: If the model attends within windows, the images cannot be used, the grid does not fit the attention, or no
            attention is seen.

    References:
        Sun et al. 2024, Massive Activations in Large Language Models, arXiv:2402.17762, sections 4 and 5 (Vision Transformers);
        Darcet et al. 2024, Vision Transformers Need Registers, arXiv:2309.16588, figures 1 and 9.

    Examples:
        >>> import torch
        >>> from vit_probe import attention_sinks, load_model
        >>> attention_sinks(load_model("demo"), torch.zeros(1, 3, 64, 64)).to_dataframe().columns.tolist()[3:]
        ['top_patch', 'std', 'confidence', 'prefix_0', 'uniform_top_patch', 'num_windows', 'num_images']
    """
    prefix = {f"prefix_{index}": share for index, share in enumerate(received.by_prefix.unbind(dim=-1))}
    return {"top_patch": received.by_patches.amax(dim=-1), **prefix}
