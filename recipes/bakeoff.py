"""Trains the arms of a recipe side by side and prints their table; recipes/bakeoff.sh starts it.

RUNS/tokens/ARM-seedN/    trained on the same tokens
RUNS/time/ARM-seedN/      trained for the same time, by the speed that the first runs had
RUNS/RECIPE.json          what the table is made of

A run whose loss or gradient is not finite ends there, and counts as diverged.
"""

import argparse
import json
import random
import shutil
import sys
import tomllib
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from recipes.bakeoff_table import build_table, write_table
from tramontane.atomic import atomic_file, atomic_folder
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.parameters import StoredParameters
from tramontane.checkpoint.writer import write_hf
from tramontane.data.sampling import sample_documents
from tramontane.data.sources import Source, parse_source
from tramontane.data.token_files import prepare_token_files
from tramontane.errors import DivergenceError
from tramontane.tokenizer.loading import load_tokenizer
from tramontane.tokenizer.trainer import train_tokenizer
from tramontane.train.held_out import HeldOutScore, measure_held_out
from tramontane.train.memory import keep_compiled_products, keep_freed_memory
from tramontane.train.pretrain import pretrain
from tramontane.train.pretrain_config import PretrainConfig, load_pretrain_config
from tramontane.train.progress import ProgressPrinter
from tramontane.train.router_health import LayerLoad
from tramontane.train.upcycle import UpcycledParameters, UpcycleOptions, plan_upcycled

RECIPE = Path(__file__).with_suffix(".toml")
WINDOW = 20  # steps whose mean loss is looked at
PAGE = Path(__file__).parents[1] / "docs" / "routing-bakeoff.md"


@dataclass(frozen=True)
class Arm:
    """One way to train; recipes/bakeoff.toml says what the fields mean."""

    name: str
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    upcycle: bool = False
    hidden: bool = False
    reference: str = ""


class Bakeoff:
    """All runs, on disk; what is finished is not run again."""

    def __init__(self, runs: Path, recipe: dict[str, Any]) -> None:
        self.runs, self.name = runs, recipe["name"]
        self.base, self.seeds = recipe["base"], recipe["seeds"]
        self.vocab_size, self.score_tokens = recipe["vocab_size"], recipe["score_tokens"]
        self.budgets = recipe["budgets"]
        self.arms = {
            name: Arm(name, **{"reference": recipe["reference"]} | values)
            for name, values in recipe["arms"].items()
        }

    def run(self, names: list[str]) -> list[dict[str, Any]]:
        """The results of the arms of these names and of what they rest on.

        All arms run with one seed before the next seed, so that a slow hour hits all of them.
        """
        self._prepare_tokenizer()
        arms = self._list_needed(names)
        results = [self._run_once(arm, seed, "tokens") for seed in self.seeds for arm in arms]
        if "time" in self.budgets:
            steps = {arm.name: self._count_steps(arm) for arm in arms if not arm.hidden}
            results += [
                self._run_once(self.arms[name], seed, "time", count)
                for seed in self.seeds
                for name, count in steps.items()
            ]
        with atomic_file(self.runs / f"{self.name}.json") as path:
            path.write_text(json.dumps(results, indent=1) + "\n")
        return results

    def _list_needed(self, names: list[str]) -> list[Arm]:
        """The arms and what they start from or are measured by, in the recipe's order."""
        needed = set(names)
        while more := {n for a in needed for n in self._list_links(a)} - needed:
            needed |= more
        return [arm for name, arm in self.arms.items() if name in needed]

    def _list_links(self, name: str) -> set[str]:
        arm = self.arms[name]
        return {arm.start, "" if arm.hidden else arm.reference} - {""}

    def _count_steps(self, arm: Arm) -> int:
        """How many steps take as long as those of the reference did."""
        reference, own = (
            median(self._run_once(a, seed, "tokens")["seconds_per_step"] for seed in self.seeds)
            for a in (self.arms[arm.reference], arm)
        )
        return max(1, round(self.base["loop"]["num_steps"] * reference / own))

    def _run_once(
        self, arm: Arm, seed: int, budget: str, steps: int | None = None
    ) -> dict[str, Any]:
        """Train and score, unless that is done."""
        if steps == self.base["loop"]["num_steps"]:  # the same tokens took the same time
            return self._run_once(arm, seed, "tokens") | {"budget": budget}
        folder = self.runs / budget / f"{arm.name}-seed{seed}"
        config = self._configure(arm, seed, folder, steps=steps)
        settings = json.loads(json.dumps(asdict(config)))
        if (folder / "result.json").exists():
            return read_result(folder / "result.json", settings)
        print(f"== same {budget}: {arm.label}, seed {seed}", file=sys.stderr, flush=True)
        with ProgressPrinter(print_every=max(1, config.loop.num_steps // 4)) as printer:
            is_begun, is_finite = any(folder.glob("checkpoints/step-*")), True
            try:
                if pretrain(config, printer, resume=is_begun) is None:
                    raise KeyboardInterrupt
            except DivergenceError as error:
                is_finite = False
                print(error, file=sys.stderr, flush=True)
        result = {"arm": arm.name, "label": arm.label, "seed": seed, "budget": budget}
        result |= {"hidden": arm.hidden, "settings": settings} | describe_run(folder, config)
        if is_finite:
            result |= self._score(folder, config)
        with atomic_file(folder / "result.json") as path:
            path.write_text(json.dumps(result, indent=1) + "\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # none of a run of a few steps
        return result

    def _configure(self, arm: Arm, seed: int, out: Path, *, steps: int | None) -> PretrainConfig:
        values = merge(self.base, arm.config) | {
            "out": str(out),
            "seed": seed,
            "tokenizer": str(self.runs / "tokenizer"),
            "tokens_dir": str(self.runs / "encoded"),
        }
        values["model"]["vocab_size"] = self.vocab_size
        if arm.start:  # other documents first, and the model that is there
            values |= {"init_from": str(self._find_start(arm, seed)), "seed": 100 + seed}
            del values["model"]
        if steps is not None:
            values["loop"]["num_steps"] = steps
        return load_pretrain_config(None, values)

    def _find_start(self, arm: Arm, seed: int) -> Path:
        """The model to go on from, upcycled if it has to be and is not yet."""
        dense = self.runs / "tokens" / f"{arm.start}-seed{seed}" / "model"
        out = self.runs / "start" / f"{arm.name}-seed{seed}"
        if arm.upcycle and not out.exists():
            checkpoint, options = open_checkpoint(dense), UpcycleOptions(seed=seed)
            stored = StoredParameters(checkpoint.pairs)
            write_hf(
                UpcycledParameters(stored, checkpoint.config, options),
                plan_upcycled(checkpoint.config, options),
                out,
                dtype=checkpoint.dtype,
                tokenizer=load_tokenizer(dense),
            )
        return out if arm.upcycle else dense

    def _score(self, folder: Path, config: PretrainConfig) -> dict[str, Any]:
        """Held-out bits per byte and the routers' loads, of the finished model in fp32."""
        scores = measure_held_out(
            load_model(folder / "model", dtype=torch.float32),
            self._read_held_out(config),
            seq_len=config.seq_len,
            max_tokens=self.score_tokens,
        )
        loads = average_loads(list(scores.values()))
        return {
            "bits_per_byte": {domain: score.bits_per_byte for domain, score in scores.items()},
            "loads": [list(load.shares) for load in loads],
            "load_entropy": [load.entropy for load in loads],
            "num_dead": sum(len(load.dead_experts) for load in loads),
        }

    def _read_held_out(self, config: PretrainConfig) -> dict[str, Any]:
        tokenizer = load_tokenizer(self.runs / "tokenizer")
        folder = self.runs / "encoded"
        files = prepare_token_files(config.parse_sources(), tokenizer, folder, splits=("valid",))
        return {domain: file for (domain, _), file in files.items()}

    def _prepare_tokenizer(self) -> None:
        """One for all arms, so that their scores and speeds compare."""
        if (self.runs / "tokenizer").exists():
            return
        texts = sample_documents(self._list_sources(), max_chars=20_000_000)
        with atomic_folder(self.runs / "tokenizer") as temporary:
            train_tokenizer(texts, vocab_size=self.vocab_size).save(temporary)

    def _list_sources(self) -> list[Source]:
        parsed = [parse_source(spec) for spec in self.base["sources"]]
        return [replace(s, path=str(Path(self.base["data_dir"]) / s.path)) for s in parsed]


def describe_run(folder: Path, config: PretrainConfig) -> dict[str, Any]:
    """What the log tells. `loss_rise`: from the lowest mean of WINDOW steps to the last (nats)."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    records = [record for record in log if "seconds" in record]
    losses = [record["loss"] for record in records]
    means = [fmean(losses[max(0, end - WINDOW) : end]) for end in range(1, len(losses) + 1)]
    pace = median(record["seconds"] for record in records)
    return {
        "parameters": asdict(config.model.count_parameters()),
        "steps": config.loop.num_steps,
        "seconds_per_step": pace,
        "tokens_per_second": config.seq_len * config.batch_size / pace,
        "loss_rise": means[-1] - min(means),
    }


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe; one that `extends` another lays its changes over all of that but its arms."""
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    if parent := recipe.pop("extends", None):
        recipe = merge(read_recipe(path.with_name(parent)) | {"arms": {}}, recipe)
    return recipe | {"name": path.stem}


def read_result(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a run gave, if it was this run."""
    result: dict[str, Any] = json.loads(path.read_text())
    if result["settings"] != settings:
        sys.exit(f"{path.parent} was run with other settings; remove it, or choose another RUNS")
    return result


def average_loads(scores: list[HeldOutScore]) -> list[LayerLoad]:
    """Each layer's shares, the mean of the domains."""
    layers = zip(*(score.layers for score in scores), strict=True)
    return [
        LayerLoad(tuple(map(fmean, zip(*(load.shares for load in layer), strict=True))))
        for layer in layers
    ]


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` with `changes` laid over it, table by table."""
    merged = deepcopy(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old or {}, value) if isinstance(value, dict) else deepcopy(value)
    return merged


def shrink(recipe: dict[str, Any], data: Path) -> dict[str, Any]:
    """The same arms at a size that takes seconds, on text that is made up here."""
    words = "the a cat dog sun moon saw met liked little big red blue and then one day".split()
    for name in ("tales", "songs"):
        rng = random.Random(name)
        texts = [" ".join(rng.choices(words, k=30)) for _ in range(60)]
        records = [{"text": t, "split": "valid" if i < 6 else "train"} for i, t in enumerate(texts)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    sizes = {"dim": 32, "n_layers": 2, "head_dim": 16, "n_heads": 2, "n_kv_heads": 1}
    base = {
        "sources": ["tales.jsonl", "songs.jsonl"],
        "seq_len": 32,
        "batch_size": 2,
        "model": sizes,
        "loop": {"num_steps": 4, "log_every": 1, "save_every": 2},
        "optimizer": {"warmup_steps": 1},
    }
    small = merge(recipe, {"seeds": [1], "vocab_size": 270, "score_tokens": 500, "base": base})
    for settings in (small["base"], *(arm.get("config", {}) for arm in small["arms"].values())):
        if "hidden_dim" in settings.get("model", {}):
            settings["model"]["hidden_dim"] //= 16
        if "layer_experts" in settings.get("model", {}).get("moe", {}):
            del settings["model"]["moe"]["layer_experts"][::2]  # half of the layers
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help=f"instead of {RECIPE.name}")
    parser.add_argument("--arms", nargs="+", help="some of those in the recipe")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe)
    if arguments.smoke:
        recipe = shrink(recipe, arguments.data)
    recipe["base"]["data_dir"] = str(arguments.data)
    names = arguments.arms or list(recipe["arms"])
    if unknown := set(names) - set(recipe["arms"]):
        parser.error(f"no arms named {sorted(unknown)}; there are {list(recipe['arms'])}")
    keep_freed_memory()
    keep_compiled_products()
    table = build_table(Bakeoff(arguments.runs, recipe).run(names))
    print(table)
    if arguments.write and not arguments.smoke:
        write_table(PAGE, recipe["name"], table)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # stopped and saved; the same command goes on
