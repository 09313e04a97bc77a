"""The bake-off at toy size: fair arms, finished runs kept, a table with what the runs gave."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.bakeoff import RECIPE, Bakeoff, merge, read_recipe, shrink
from recipes.bakeoff_table import build_table, list_marks, write_table
from tramontane.config import ModelConfig, ParameterCount
from tramontane.errors import DivergenceError
from tramontane.train.loop import Trainer

ROOT = Path(__file__).parents[2]


Z_LOSS = RECIPE.with_name("z_loss.toml")


def read_small_recipe(data: Path, path: Path = RECIPE) -> dict[str, Any]:
    recipe = shrink(read_recipe(path), data)
    recipe["base"]["data_dir"] = str(data)
    return recipe


def count(recipe: dict[str, Any], name: str) -> ParameterCount:
    values = merge(recipe["base"], recipe["arms"][name].get("config", {}))["model"]
    return ModelConfig.from_dict(values | {"vocab_size": 2048}).count_parameters()


def test_arms_are_equal_in_what_they_say() -> None:
    """Sparse ones in both counts, the dense ones in one each; up to the routers' weights."""
    recipe = read_recipe(RECIPE)
    mixtral = count(recipe, "mixtral")
    for name, arm in recipe["arms"].items():
        if "moe" in arm.get("config", {}).get("model", {}):
            total = mixtral.total * (0.9 if name == "pr-moe" else 1.0)
            assert count(recipe, name).total == pytest.approx(total, rel=0.005), name
            assert count(recipe, name).active == pytest.approx(mixtral.active, rel=0.005), name
    assert count(recipe, "dense-active").active == pytest.approx(mixtral.active, rel=0.005)
    assert count(recipe, "dense-total").total == pytest.approx(mixtral.total, rel=0.005)


def test_finished_runs_are_kept_and_broken_ones_go_on(tmp_path: Path) -> None:
    recipe = read_small_recipe(tmp_path)
    runs = tmp_path / "runs"
    results = Bakeoff(runs, recipe).run(["upcycled"])
    assert [(r["arm"], r["budget"]) for r in results] == [
        ("dense-start", "tokens"), ("upcycled", "tokens"), ("upcycled", "time")
    ]  # fmt: skip
    assert results[1]["load_entropy"]
    assert not results[0]["load_entropy"]
    assert results[1]["steps"] == results[2]["steps"] == 4  # its own reference
    assert set(results[1]["bits_per_byte"]) == {"tales", "songs"}
    times = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/result.json")}
    (runs / "tokens" / "upcycled-seed1" / "result.json").unlink()
    again = Bakeoff(runs, recipe).run(["upcycled"])
    kept = runs / "tokens" / "dense-start-seed1" / "result.json"
    assert kept.stat().st_mtime_ns == times[kept]
    assert again[1]["bits_per_byte"] == results[1]["bits_per_byte"]
    assert json.loads((runs / "bakeoff.json").read_text()) == again
    changed = merge(recipe, {"base": {"optimizer": {"lr": 1e-4}}})
    with pytest.raises(SystemExit, match="dense-start-seed1 was run with other settings"):
        Bakeoff(runs, changed).run(["upcycled"])


def test_another_recipe_extends_the_first(tmp_path: Path) -> None:
    recipe, whole = read_recipe(Z_LOSS), read_recipe(RECIPE)
    assert recipe["base"]["optimizer"]["lr"] == pytest.approx(10 * whole["base"]["optimizer"]["lr"])
    assert recipe["base"]["sources"] == whole["base"]["sources"]
    results = Bakeoff(tmp_path / "runs", read_small_recipe(tmp_path, Z_LOSS)).run(
        list(recipe["arms"])
    )
    coefs = [r["settings"]["loop"]["router_z_coef"] for r in results]
    assert (coefs, {r["budget"] for r in results}) == ([1e-3, 0.0], {"tokens"})
    assert "| no z-loss |" in build_table(results)


def test_a_run_that_diverges_is_counted_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(trainer: Trainer[Any], *arguments: Any, **options: Any) -> dict[str, float]:
        values = backward(trainer, *arguments, **options)
        if trainer.step == 3 and not trainer.config.router_z_coef:
            raise DivergenceError("step 4: the loss is not finite")
        return values

    backward = Trainer._backward
    monkeypatch.setattr(Trainer, "_backward", explode)
    recipe = read_small_recipe(tmp_path, Z_LOSS)
    results = [Bakeoff(tmp_path / "runs", recipe).run(list(recipe["arms"])) for _ in range(2)]
    assert results[0] == results[1]
    assert ["bits_per_byte" in result for result in results[0]] == [True, False]
    cells = [line.split(" | ") for line in build_table(results[0]).splitlines()[4:]]
    assert [(row[3] == "-", row[-1]) for row in cells] == [(False, "0 of 1 |"), (True, "1 of 1 |")]


def make_result(arm: str, budget: str, seed: int, bits: float, **changes: Any) -> dict[str, Any]:
    values = {
        "arm": arm, "label": arm.upper(), "seed": seed, "budget": budget, "steps": 300,
        "parameters": {"total": 4_000_000, "active": 1_500_000}, "seconds_per_step": 0.2,
        "tokens_per_second": 20480.0, "bits_per_byte": {"a": bits, "b": bits + 1},
        "load_entropy": [0.9, 0.8], "num_dead": 1, "hidden": False, "loss_rise": 0.1,
    }  # fmt: skip
    return values | changes


def test_the_table_has_means_and_spread(tmp_path: Path) -> None:
    results = [
        make_result("moe", "tokens", 1, 1.0), make_result("moe", "tokens", 2, 1.2),
        make_result("moe", "time", 1, 1.5), make_result("moe", "time", 2, 1.5, loss_rise=0.6),
        make_result("start", "tokens", 1, 9.0, hidden=True),
        make_result("dense", "tokens", 1, 2.0, load_entropy=[], num_dead=0),
        make_result("dense", "time", 1, 1.0, load_entropy=[], num_dead=0, steps=600),
    ]  # fmt: skip
    table = build_table(results)
    rows = table.splitlines()[4:]
    assert rows == [
        "| MOE | 4.00M, 1.50M | 20,480 | 1.6000 \u00b1 0.1414 | 2.0000 \u00b1 0.0000 | "
        "300 in 1.0 | 0.8000 \u00b1 0.0000 | 1.0 | 1 of 4 |",
        "| DENSE | 4.00M, 1.50M | 20,480 | 2.5000 | 1.5000 | 600 in 2.0 | - | - | 0 of 2 |",
    ]
    page = tmp_path / "page.md"
    begin, end = list_marks("bakeoff")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    write_table(page, "bakeoff", table)
    assert page.read_text() == f"before\n{begin}\n{table}\n{end}\nafter\n"
    with pytest.raises(SystemExit, match="no place for the table"):
        write_table(page, "z_loss", table)


@pytest.mark.parametrize("recipe", [RECIPE, Z_LOSS], ids=lambda path: path.stem)
def test_the_page_has_a_place_for_the_table(recipe: Path) -> None:
    text = (ROOT / "docs" / "routing-bakeoff.md").read_text()
    begin, end = list_marks(recipe.stem)
    assert 0 < text.index(begin) < text.index(end)


@pytest.mark.slow
def test_one_command_runs_all_arms(tmp_path: Path) -> None:
    environment = os.environ | {"BIN": str(Path(sys.executable).parent)}
    done = subprocess.run(
        ["recipes/bakeoff.sh", "--smoke"], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    shown = [arm["label"] for arm in read_recipe(RECIPE)["arms"].values() if not arm.get("hidden")]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]] == shown
