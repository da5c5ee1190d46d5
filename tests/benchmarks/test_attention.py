"""The benchmark on models of two layers: its tables, and that it stops if methods measure different things."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import attention, formulas, memory
from benchmarks.cases import CASES, Case, quick
from benchmarks.measuring import Timing, check_agreement
from benchmarks.memory import Peak, available_bytes, peak_in_fresh_process
from benchmarks.methods import METHODS, with_floors
from benchmarks.models import Setting
from benchmarks.report import make_row, side_by_side
from vit_probe import InputError
from vit_probe.tokens.grid import TokenGrid

pytest.importorskip("timm")
pytest.importorskip("transformers")

CPU = torch.device("cpu")
FLOORS = {"fused", "timm-fused", "transformers-sdpa"}


def tiny(side: int) -> Case:
    return Case(
        f"tiny-{side**2}", embed_dim=32, depth=2, num_heads=2, side=side, images=3, batch_size=2, patch_size=4, left_out={}
    )


def bench(out: Path, *cases: Case, methods: list[str] | None = None, repeats: int = 2) -> pd.DataFrame:
    csv, _ = attention.benchmark(cases, methods, device=CPU, dtype=torch.float32, repeats=repeats, out=out)
    return pd.read_csv(csv)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory without fresh processes: the n-th method takes n MB."""
    monkeypatch.setattr(
        attention, "peak_in_fresh_process", lambda setting, name: Peak(1_000_000 * (1 + list(METHODS).index(name)))
    )


@pytest.mark.usefixtures("no_processes")
def test_every_method_of_every_case_is_in_the_tables(tmp_path: Path) -> None:
    frame = bench(tmp_path, tiny(4), tiny(6))
    assert list(zip(frame["case"], frame["method"], strict=True)) == [
        (case, name) for case in ("tiny-16", "tiny-36") for name in METHODS
    ]
    assert (frame["repeats"] == 2).all()
    (markdown,) = tmp_path.glob("*.md")
    assert markdown.read_text(encoding="utf-8").count("; 2 repeats") == 2
    ratios = frame[[column for column in frame if "ratio" in column]]
    assert (ratios > 0).all(axis=None)
    assert (frame["cpu_ratio_low"] <= frame["cpu_ratio"]).all()
    assert (frame["cpu_ratio"] <= frame["cpu_ratio_high"]).all()
    assert (ratios[frame["method"].isin(FLOORS)] == 1).all(axis=None)
    assert not (frame["cpu_ratio"][~frame["method"].isin(FLOORS)] == 1).any()
    keras = frame[frame["method"] == "transformers-keras"]
    place, floor = list(METHODS).index("transformers-keras"), list(METHODS).index("transformers-sdpa")
    assert keras["memory_ratio"].tolist() == pytest.approx([(place + 1) / (floor + 1)] * 2, abs=1e-4)
    text = (tmp_path / f"cpu-{date.today().isoformat()}.md").read_text()
    assert "## tiny-16" in text
    assert "2 layers, 2 heads, width 32; 36 patches" in text
    assert f"torch {torch.__version__}" in text
    assert text.count("| transformers-keras |") == 3  # all cases side by side, and each


def test_all_cases_side_by_side() -> None:
    first, second = tiny(4), replace(tiny(6), name="larger")
    times = Timing(cpu=np.array([1.5, 1.25, 9.0]), wall=np.ones(3))
    rows = [
        make_row(first, "a", "a", None, None, None, "does not fit"),
        make_row(first, "b", "a", times, Peak(3_000_000), Peak(2_000_000)),
        make_row(second, "b", "a", replace(times, cpu=times.cpu + 1), Peak(None, "no memory"), Peak(2_000_000)),
    ]
    assert side_by_side(rows).splitlines() == [
        "| method | tiny-16 | larger |",
        "| --- | ---: | ---: |",
        "| a | -, - |  |",
        "| b | 1.50, 1.50 | 2.50, - |",
    ]


@pytest.mark.usefixtures("no_processes")
def test_finished_cases_are_kept_when_a_later_case_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ["vit-probe-distance"]
    bench(tmp_path, tiny(2), methods=methods)
    measure = attention._measure

    def fail(setting: Setting, *given: object) -> object:
        if setting.case.side == 6:
            raise KeyboardInterrupt
        return measure(setting, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "_measure", fail)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, tiny(4), tiny(6), methods=methods)
    (csv,) = tmp_path.glob("*.csv")
    frame = pd.read_csv(csv)
    assert list(frame["case"]) == ["tiny-4", "tiny-4", "tiny-16", "tiny-16"]
    assert list(frame["method"]) == ["fused", "vit-probe-distance"] * 2


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        ("transformers-keras", "keras_distance"),
        ("transformers-distance", "torch_distance"),
        ("timm-hooks-distance", "torch_distance"),
        ("timm-extract-distance", "torch_distance"),
        ("transformers-rollout", "rollout_maps"),
        ("timm-hooks-rollout", "rollout_maps"),
    ],
)
@pytest.mark.usefixtures("no_processes")
def test_a_method_that_measures_something_else_stops_it(
    method: str, formula: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(formulas, formula)
    monkeypatch.setattr(formulas, formula, lambda *given: 1.002 * right(*given))
    with pytest.raises(RuntimeError, match=f"{method}: .* differs from vit_probe's by a relative 2.0e-03, more than 1e-03"):
        bench(tmp_path, tiny(4), methods=[method])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("floor", sorted(FLOORS))
def test_a_model_with_other_weights_stops_it(floor: str) -> None:
    setting = Setting(tiny(4), CPU, torch.float32)
    run = METHODS[floor].prepare(setting)
    output = run(setting.batches)
    with torch.no_grad():
        setting.own.blocks[1].mlp.fc2.bias[0] += 1  # the models share their weights
    with pytest.raises(RuntimeError, match="output differs"):
        check_agreement(floor, run(setting.batches), output, 1e-3)


def test_numbers_of_another_shape_or_none() -> None:
    expected = {"distance": np.ones((2, 2))}
    with pytest.raises(RuntimeError, match=r"shape \(2, 1\), vit_probe's \(2, 2\)"):
        check_agreement("peer", {"distance": np.ones((2, 1))}, expected, 1e-3)
    with pytest.raises(RuntimeError, match="no numbers"):
        check_agreement("peer", {}, expected, 1e-3)
    with pytest.raises(RuntimeError, match="by a relative nan"):
        check_agreement("peer", {"distance": np.full((2, 2), np.nan)}, expected, 1e-3)


def test_attention_is_far_from_uniform_so_that_agreement_means_something() -> None:
    setting = Setting(tiny(6), CPU, torch.float32)
    distance = METHODS["vit-probe-distance"].prepare(setting)(setting.batches)["distance"]
    assert np.abs(distance / setting.grid.uniform_distance() - 1).max() > 0.02
    assert distance.std() > 0.01 * distance.mean()


def test_patch_distances_are_those_between_centres() -> None:
    distances = formulas.patch_distances(TokenGrid(2, 3, (4, 3), 0, False))
    assert distances[0].tolist() == pytest.approx([0, 3, 6, 4, 5, 52**0.5])
    assert (distances == distances.T).all()


@pytest.mark.usefixtures("no_processes")
def test_methods_that_do_not_fit_are_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["vit-probe-distance", "transformers-distance", "timm-hooks-distance"]
    case = tiny(4)
    maps = 2 * 17 * 17 * 4  # bytes of a head's maps of a batch
    assert [METHODS[name].needed_bytes(case) // maps for name in names] == [0, 2 * (2 + 2), 2 * 2]
    monkeypatch.setattr(attention, "available_bytes", lambda device: 7 * maps)
    frame = bench(tmp_path, case, methods=names).set_index("method")
    assert frame.loc["transformers-distance", "note"] == f"does not fit ({8 * maps / 1e9:.3g} GB)"
    assert np.isnan(frame.loc["transformers-distance", "cpu_ratio"])
    assert frame.loc["transformers-distance", "repeats"] == 0
    assert "transformers-sdpa" not in frame.index  # nothing is compared with it
    assert (frame.loc[["vit-probe-distance", "timm-hooks-distance"], "repeats"] == 2).all()


@pytest.mark.usefixtures("no_processes")
def test_a_method_that_a_case_leaves_out_is_run_if_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "METHODS", {name: METHODS[name] for name in ("fused", "vit-probe-rollout")})
    case = replace(tiny(4), left_out={"vit-probe-rollout": "left out: long"})
    frame = bench(tmp_path, case).set_index("method")
    assert frame.loc["vit-probe-rollout", "note"] == "left out: long"
    assert frame.loc["vit-probe-rollout", "repeats"] == 0
    frame = bench(tmp_path, case, methods=["vit-probe-rollout"]).set_index("method")
    assert frame.loc["vit-probe-rollout", "repeats"] == 2


def test_memory_does_not_include_the_model() -> None:
    # 1,025 tokens: the maps of a layer take 4 heads x 1,025^2 x 4 bytes = 17 MB, and two are there at once.
    case = replace(tiny(32), num_heads=4, embed_dim=16, images=1, batch_size=1)
    setting = Setting(case, CPU, torch.float32)
    peak, plain = (peak_in_fresh_process(setting, name) for name in ("timm-hooks-distance", "fused"))
    assert peak.note == plain.note == ""
    assert peak.size is not None
    assert plain.size is not None
    assert 15e6 < peak.size - plain.size < 60e6
    assert plain.size < 60e6


def test_the_note_says_that_a_process_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    peak = peak_in_fresh_process(Setting(tiny(4), CPU, torch.float32), "fused")
    assert peak == Peak(None, "no memory: the process ended with 1 (no message)")


def test_available_memory_is_known_on_linux() -> None:
    available = available_bytes(CPU)
    if Path("/proc/meminfo").exists():
        assert available is not None
        assert 1e8 < available < 1e15


def test_cases_are_those_of_the_papers() -> None:
    assert [case.side**2 for case in CASES.values()] == [196, 196, 784, 1369, 4096, 16384]
    assert (CASES["base-196"].image_size, CASES["base-196"].images) == (224, 128)
    assert all(set(case.left_out) <= set(METHODS) for case in CASES.values())
    small = quick(CASES["base-196"])
    assert small is not None
    assert (small.images, small.batch_size) == (4, 4)
    assert quick(CASES["small-16384"]) is None


def test_floors_come_first_and_once() -> None:
    assert with_floors(["vit-probe-distance", "fused", "timm-hooks-distance"]) == [
        "fused",
        "timm-fused",
        "vit-probe-distance",
        "timm-hooks-distance",
    ]


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no case nothing; choose from base-196"):
        attention.main(case=["nothing"], out=tmp_path)
    with pytest.raises(InputError, match="no method nothing; choose from fused"):
        attention.main(method=["nothing"], out=tmp_path)
    with pytest.raises(InputError, match="no case is left"):
        attention.main(case=["small-4096"], quick_=True, out=tmp_path)
