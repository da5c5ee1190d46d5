"""What every measure of the registry can do: resume, merge, undo, save, tabulate, plot, whatever the batches and tiles."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from tests.example_models import Hungry, images
from tests.measures.table import ROWS, SETTINGS
from tests.measures.tiles import arrays_of
from vit_probe import InputError, attention_hooks, load_result, measure
from vit_probe.attention.intercept import ForwardStopped
from vit_probe.attention.tiles import TILE_BYTES
from vit_probe.measures.base.per_head import HeadResult
from vit_probe.measures.base.per_layer import LayerResult
from vit_probe.measures.base.registry import registered
from vit_probe.results import Result
from vit_probe.runner.protocol import Measure, PerImage
from vit_probe.runner.resume import RunState, read_state, write_state
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.hidden_states import TokenObserver, token_hooks

pytestmark = pytest.mark.usefixtures("measures_of_users")

CHOSEN = ("registers", "shifted windows")
CASES = [(setting, name) for setting in CHOSEN for name, rows in ROWS.items() if setting not in rows[0].fails]
every_measure = pytest.mark.parametrize(("setting", "name"), CASES)


# All measures of a model share each pass, which is computed once for all tests


@dataclass(frozen=True)
class Bench:
    """A model, eight images for it, and the run that measures are started with."""

    setting: str
    model: nn.Module
    x: Tensor
    run: AttentionRun

    def start(self) -> dict[str, Measure]:
        """All measures that go over images, new."""
        specs = {name: registered()[name] for setting, name in CASES if setting == self.setting}
        return {
            name: spec.start(self.run, **(dict(spec.options) | ({"per_image": True} if "per_image" in spec.options else {})))
            for name, spec in specs.items()
            if spec.start is not None
        }

    def show(self, measures: Mapping[str, Measure], x: Tensor, tile_bytes: int = TILE_BYTES) -> None:
        """A forward pass of some images."""
        observers = list(measures.values())
        of_tokens = [one for one in observers if isinstance(one, TokenObserver)]
        for one in observers:
            one.begin_batch()
        with (
            torch.no_grad(),
            attention_hooks(self.model, *observers, tile_bytes=tile_bytes),
            token_hooks(self.model, self.run.layout, of_tokens),
            suppress(ForwardStopped),
        ):
            self.model(x)
        for one in observers:
            one.end_batch()

    def measured(self, *batches: Tensor, tile_bytes: int = TILE_BYTES) -> dict[str, Measure]:
        measures = self.start()
        for batch in batches:
            self.show(measures, batch, tile_bytes)
        return measures


@cache
def bench(setting: str) -> Bench:
    model = SETTINGS[setting].build().eval().double()
    x = images(*SETTINGS[setting].size, batch=8).double()
    return Bench(setting, model, x, AttentionRun(model, x, device="cpu"))


def results(measures: Mapping[str, Measure]) -> dict[str, Result]:
    return {name: one.compute() for name, one in measures.items()}


@cache
def whole(setting: str) -> dict[str, Result]:
    """Of all images, in two batches."""
    return results(bench(setting).measured(*bench(setting).x.split(4)))


def same(mine: Result, theirs: Result) -> None:
    """All arrays and plain values agree."""
    assert type(mine) is type(theirs)
    arrays, expected = arrays_of(mine), arrays_of(theirs)
    assert list(arrays) == list(expected)
    for name, values in expected.items():
        tolerance = 1e-6 if values.dtype == np.float32 else 1e-9
        np.testing.assert_allclose(arrays[name], values, rtol=tolerance, atol=tolerance / 10, err_msg=name)
    for name, value in vars(theirs).items():
        if name != "provenance" and not isinstance(value, np.ndarray | dict):
            assert getattr(mine, name) == value, name


def check(found: Mapping[str, Result], setting: str, name: str) -> None:
    """Compare with the measure of all images; there is nothing to compare for measures of weights alone."""
    if registered()[name].start is not None:
        same(found[name], whole(setting)[name])


# Resuming


@cache
def resumed(setting: str) -> dict[str, Result]:
    """Written to a file and read back before each batch, by measures that begin anew."""
    at, measures = bench(setting), bench(setting).start()
    for batch in at.x.split(4):
        with TemporaryDirectory() as folder:
            path = write_state(Path(folder) / "state", {}, RunState({}, [one.state() for one in measures.values()]))
            state = read_state(path, {})
        assert state is not None
        measures = at.start()
        for one, values in zip(measures.values(), state.measures, strict=True):
            one.restore(values)
        at.show(measures, batch)
    return results(measures)


@every_measure
def test_a_restored_measure_continues_where_the_state_was_taken(setting: str, name: str) -> None:
    check(resumed(setting), setting, name)


@cache
def empty(setting: str) -> dict[str, Measure]:
    return bench(setting).start()


@every_measure
def test_nothing_measured_is_an_error(setting: str, name: str) -> None:
    one = empty(setting).get(name)
    if one is not None:
        with pytest.raises(InputError, match=r"^no .* been measured yet"):
            one.compute()


# Merging


@cache
def merged(setting: str, order: tuple[int, ...]) -> dict[str, Result]:
    """Of shards, two of them empty, merged in some order; then put back into the order of the images."""
    at = bench(setting)
    parts = [at.x[:4], at.x[:0], at.x[4:], at.x[:0]]
    shards = [at.measured(*([parts[index]] if len(parts[index]) else [])) for index in order]
    first = [0, 0, 4, 0]
    came = [first[index] + image for index in order for image in range(len(parts[index]))]
    for name, one in shards[0].items():
        for other in shards[1:]:
            before = other[name].state()
            one.merge(other[name])
            assert repr(other[name].state()) == repr(before)
        if isinstance(one, PerImage):
            one.reorder([came.index(image) for image in range(8)])
    return results(shards[0])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 3, 2, 0)])
@every_measure
def test_shards_merged_in_any_order_are_the_whole(setting: str, name: str, order: tuple[int, ...]) -> None:
    check(merged(setting, order), setting, name)


@every_measure
def test_measures_with_other_options_are_not_merged(setting: str, name: str) -> None:
    spec = registered()[name]
    others = [row.options for row in ROWS[name][1:] if setting not in row.fails]
    if spec.start is None or not others:
        return
    one, other = (spec.start(bench(setting).run, **(dict(spec.options) | options)) for options in ({}, others[0]))
    with pytest.raises(InputError, match=r"^cannot merge"):
        one.merge(other)


# Undoing


class Interrupted(RuntimeError):
    pass


@cache
def undone(setting: str) -> dict[str, Result]:
    """A batch breaks off in the last layer and is taken back twice; another is taken back after its end."""
    at = bench(setting)
    measures = at.measured(at.x[:4])

    def interrupt(*args: Any) -> None:
        raise Interrupted

    hook = at.model.get_submodule(at.run.layers[-1]).register_forward_pre_hook(interrupt)
    try:
        for images_shown in (at.x[4:], at.x[2:7]):
            with pytest.raises(Interrupted):
                at.show(measures, images_shown)
            for one in measures.values():
                one.roll_back()
    finally:
        hook.remove()
    at.show(measures, at.x[3:])
    for one in measures.values():
        one.roll_back()
    at.show(measures, at.x[4:])
    return results(measures)


@every_measure
def test_a_batch_that_is_taken_back_leaves_nothing(setting: str, name: str) -> None:
    check(undone(setting), setting, name)


@cache
def with_little_memory() -> tuple[dict[str, Result], dict[str, Result]]:
    """All measures of a model that runs out of memory with more than four images, and of one that does not."""
    specs = {name: registered()[name] for setting, name in CASES if setting == "registers"}
    functions = [spec.function for spec in specs.values() if spec.start is not None]
    names = [name for name, spec in specs.items() if spec.start is not None]
    x = images(batch=8)
    with pytest.warns(match="out of memory"):
        few = measure(Hungry(4), x, functions, batch_size=8, per_image=True, device="cpu")
    enough = measure(Hungry(8), x, functions, batch_size=4, per_image=True, device="cpu")
    return dict(zip(names, few, strict=True)), dict(zip(names, enough, strict=True))


@pytest.mark.parametrize("name", [name for setting, name in CASES if setting == "registers"])
def test_batches_that_run_out_of_memory(name: str) -> None:
    few, enough = with_little_memory()
    if name in few:
        same(few[name], enough[name])


# Batches, tiles and order


@cache
def in_tiles(setting: str, tile_bytes: int) -> dict[str, Result]:
    return results(bench(setting).measured(*bench(setting).x.split(4), tile_bytes=tile_bytes))


@pytest.mark.parametrize("tile_bytes", [1, 20000])
@every_measure
def test_any_tiles_give_the_same(setting: str, name: str, tile_bytes: int) -> None:
    check(in_tiles(setting, tile_bytes), setting, name)


@cache
def in_batches(setting: str) -> dict[str, Result]:
    measures = bench(setting).measured(*bench(setting).x.split([1, 5, 2]))
    # Others depend on which images share a batch.
    return results({name: one for name, one in measures.items() if getattr(one, "min_batch_size", 1) == 1})


@every_measure
def test_any_batches_give_the_same(setting: str, name: str) -> None:
    if name in in_batches(setting):
        check(in_batches(setting), setting, name)
    else:
        assert registered()[name].start is None or name == "representation_similarity"


ORDER = [3, 1, 0, 2, 6, 7, 4, 5]  # within batches of four


@cache
def permuted(setting: str) -> tuple[dict[str, Result], dict[str, Result]]:
    """Of images in another order, as they came and put back."""
    at = bench(setting)
    measures = at.measured(*at.x[ORDER].split(4))
    came = results(measures)
    for one in measures.values():
        if isinstance(one, PerImage):
            one.reorder([ORDER.index(image) for image in range(8)])
    return came, results(measures)


@every_measure
def test_the_order_of_images_is_that_of_the_values_of_single_images(setting: str, name: str) -> None:
    came, back = permuted(setting)
    check(back, setting, name)
    if name in came and isinstance(empty(setting)[name], PerImage):
        by_image = [array for array in arrays_of(back[name]) if array == "maps" or array.startswith("per_image/")]
        pairs = [(arrays_of(came[name])[array], arrays_of(back[name])[array]) for array in by_image]
        for mine, theirs in pairs:
            np.testing.assert_array_equal(mine, theirs[ORDER])
        assert any(not np.allclose(mine, theirs, equal_nan=True) for mine, theirs in pairs)


# Results


@cache
def all_results(setting: str) -> dict[str, Result]:
    of_weights = {
        name: registered()[name].function(bench(setting).model)  # type: ignore[call-arg]
        for at, name in CASES
        if at == setting and registered()[name].start is None
    }
    return whole(setting) | of_weights


@every_measure
def test_saved_and_read_back(setting: str, name: str, tmp_path: Path) -> None:
    result = all_results(setting)[name]
    again = load_result(result.save(tmp_path / "result.safetensors"))
    assert again.measure == name
    same(again, result)
    for field, values in arrays_of(result).items():
        np.testing.assert_array_equal(arrays_of(again)[field], values)
        assert arrays_of(again)[field].dtype == values.dtype
    assert again.provenance == result.provenance
    assert again.to_dataframe().equals(result.to_dataframe())
    assert again.summary().equals(result.summary())
    assert repr(again) == repr(result)


@every_measure
def test_copied_and_pickled(setting: str, name: str) -> None:
    result = all_results(setting)[name]
    for again in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        same(again, result)
        assert again is not result


@every_measure
def test_tables(setting: str, name: str) -> None:
    result = all_results(setting)[name]
    for table in (result.to_dataframe(), result.csv_table(), result.summary()):
        assert len(table) > 0
        assert table.columns.is_unique
        numbers = table.select_dtypes("number")
        assert numbers.shape[1] > 0
        assert not np.isinf(numbers.to_numpy(dtype=float)).any()
    if isinstance(result, HeadResult | LayerResult):
        table = result.to_dataframe()
        assert table.notna().all(axis=None)
        assert (table["num_images"] == 8).all()
        assert table["module"].tolist() == [bench(setting).run.layers[layer] for layer in table["layer"]]
        main = result.values[result.main]
        np.testing.assert_array_equal(table[result.main], main[~np.isnan(main)])
        np.testing.assert_array_equal(table["std"], result.std[result.main][~np.isnan(main)])
        np.testing.assert_array_equal(table["confidence"], result.confidence[result.main][~np.isnan(main)])
        assert result.summary()["layer"].tolist() == list(range(len(result.modules)))


@every_measure
def test_key_numbers(setting: str, name: str) -> None:
    numbers = all_results(setting)[name].key_numbers()
    assert len(numbers) > 0
    assert len({number for number, _, _ in numbers}) == len(numbers)
    for number, unit, value in numbers:
        assert isinstance(number, str)
        assert isinstance(unit, str)
        assert type(value) is float
        assert np.isfinite(value), number


@every_measure
def test_pictures(setting: str, name: str) -> None:
    result = all_results(setting)[name]
    for draw in (result.plot, result.plot_panel):
        axes = Figure(figsize=(4, 3)).add_subplot()
        assert draw(ax=axes) is axes
        assert [*axes.lines, *axes.collections, *axes.images, *axes.patches, *axes.child_axes]
        axes.figure.draw_without_rendering()
    assert isinstance(result.plot(), Axes)
    assert result.panel_title
    if isinstance(result, HeadResult | LayerResult):
        assert result.label
        assert result.unit in result.panel_title


@every_measure
def test_values_of_single_images(setting: str, name: str) -> None:
    if "per_image" not in registered()[name].options:
        return
    result: Any = whole(setting)[name]
    assert list(result.per_image) == list(result.values)
    for value, of_images in result.per_image.items():
        assert of_images.shape == (8, *result.values[value].shape)
        np.testing.assert_allclose(of_images.mean(axis=0), result.values[value], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(of_images.std(axis=0, ddof=1), result.std[value], rtol=1e-7, atol=1e-12)
    table, summary = result.to_dataframe(per_image=True), result.to_dataframe()
    assert len(table) == 8 * len(summary)
    assert table.notna().all(axis=None)
    assert table["name"].drop_duplicates().tolist() == result.names == [f"image {index}" for index in range(8)]
    keys = [key for key in ("layer", "module", "head", getattr(result, "axis", None)) if key in table]
    columns = [column for column in result.values if column in table]
    assert result.main in columns
    pd.testing.assert_frame_equal(
        table.groupby(keys, sort=False)[columns].mean().reset_index(), summary[[*keys, *columns]], rtol=1e-9
    )
    one = table[(table["image"] == 7) & (table["layer"] == 1)]
    values = result.per_image[result.main][7, 1]
    np.testing.assert_array_equal(one[result.main], np.atleast_1d(values)[~np.isnan(np.atleast_1d(values))])


@pytest.mark.parametrize("name", [name for setting, name in CASES if setting == "registers"])
def test_values_of_single_images_are_kept_on_request_only(name: str) -> None:
    spec = registered()[name]
    if "per_image" in spec.options:
        plain = spec.function(bench("registers").model, images(batch=2), device="cpu")  # type: ignore[call-arg]
        assert plain.per_image == {}  # type: ignore[attr-defined]
        assert plain.names == []  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="values of single images were not kept; measure with per_image=True"):
            plain.to_dataframe(per_image=True)  # type: ignore[call-arg]


# The public function


@pytest.mark.parametrize("name", ROWS)
def test_signature_and_docstring(name: str) -> None:
    spec = registered()[name]
    signature = inspect.signature(spec.function)
    documented = argument_names(spec.function)
    common = ["grid", "preprocessing", "batch_size", "device"] if spec.start is not None else []
    assert list(signature.parameters)[:1] == ["model"]
    assert sorted(documented) == sorted(signature.parameters)
    assert {*common} <= set(signature.parameters)
    assert len((inspect.getdoc(spec.function) or "").partition("\n")[0]) > 20
    if name != "representation_similarity":  # which compares two models
        assert list(signature.parameters) == [
            "model",
            *(["images"] if spec.start is not None else []),
            *spec.options,
            *common,
        ]
    for option, default in spec.options.items():
        if option in signature.parameters:
            assert signature.parameters[option].default == default
            assert signature.parameters[option].kind is inspect.Parameter.KEYWORD_ONLY


def argument_names(function: Callable[..., Any]) -> list[str]:
    section = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    return [line.strip().partition(":")[0] for line in section.splitlines() if not line.startswith("     ")]


@pytest.mark.parametrize("name", ROWS)
def test_unknown_options(name: str) -> None:
    spec = registered()[name]
    with pytest.raises(InputError, match=f"{spec.function.__name__} has no option nonsense; it has"):
        measure(bench("registers").model, images(), [partial(spec.function, nonsense=1)])
    with pytest.raises(TypeError, match="nonsense"):
        spec.function(bench("registers").model, images(), nonsense=1)  # type: ignore[call-arg]
