"""Norms of the patch tokens after each layer, and whether some of the tokens are artifacts.

Published (Darcet et al. 2024, Vision Transformers Need Registers, arXiv:2309.16588, figures 3, 4 and 7): in large models that
were trained for long, about 2 % of the patch tokens have norms far above those of the others, from the middle layers on; DINOv2
models smaller than ViT-L have none, nor have models that were trained with registers. Criterion used here: the last layer has
artifacts if the model has as many parameters as ViT-L and no registers, and otherwise none. For training methods other than
DINOv2, the paper finds artifacts in some smaller models (DeiT-III-B and OpenCLIP-B, figure 2), which would count as not as
published here. A small model with random weights has none either.

    python -m analyses.token_norms --model demo
"""

from __future__ import annotations

import pandas as pd

from analyses.study import Finding, keep
from vit_probe import token_norms
from vit_probe.cli.study import StudyOptions, load, run_study

LARGE = 3e8  # parameters; ViT-L has 304 million, ViT-B 86


def main(options: StudyOptions) -> None:
    """Draw the distribution of the norms of patch tokens in every layer, and find the artifacts among them."""
    model, photographs = load(options)
    result = token_norms(model, photographs)
    layers = result.to_dataframe()
    table = result.histogram().merge(layers.drop(columns=["module", "tokens"]), on="layer")
    grid = result.provenance["grid"]
    more = grid["num_prefix_tokens"] - grid["has_cls_token"]
    unnamed = 0 if more == grid["has_cls_token"] else more  # a single one beside a class token is DeiT's distillation token
    registers = getattr(getattr(model, "config", None), "num_registers", unnamed)
    finding = found(layers, sum(parameter.numel() for parameter in model.parameters()), registers)
    keep("token_norms", result.plot(), table, finding, result.provenance, options)


def found(layers: pd.DataFrame, parameters: int, registers: int) -> Finding:
    """The finding, from the table of a model and its numbers of parameters and registers."""
    last, some, registered = layers.iloc[-1], layers[layers["artifacts"] > 0], registers > 0
    text = f"Of the {len(layers)} layers of a model with {parameters / 1e6:.1f} million parameters"
    text += f" and {registers} register{'s' * (registers > 1)}, " if registered else ", "
    if some.empty:
        text += f"none has artifacts; in the last, the highest norm is {last['highest'] / last['median']:.1f} times the median."
    else:
        most = some.iloc[int(some["artifacts"].to_numpy().argmax())]
        text += (
            f"{len(some)} have artifacts, starting with layer {some['layer'].iloc[0]:.0f}. Layer {most['layer']:.0f} has the "
            f"most: {100 * most['artifacts']:.2g} % of the patch tokens, in {most['artifact_images']:.0%} of the images, with "
            f"a norm of {most['artifact_norm']:.3g} compared with {most['typical_norm']:.3g} for the others. In the last "
            f"layer, {100 * last['artifacts']:.2g} % of the patch tokens are artifacts."
        )
    if parameters >= LARGE and not registered:
        return Finding(text, {"a large model has artifacts after the last layer": bool(last["artifacts"] > 0)})
    smaller = "with registers" if registered else "smaller than ViT-L"
    return Finding(text, {f"a model {smaller} has no artifacts after the last layer": bool(last["artifacts"] == 0)})


if __name__ == "__main__":
    run_study(main)
