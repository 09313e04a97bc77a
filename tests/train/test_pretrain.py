"""Pre-training from text to a model folder, at toy size."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import make_config, make_model
from tramontane.checkpoint.loader import load_model
from tramontane.config import MoeConfig
from tramontane.data.token_files import TokenFile
from tramontane.engine.llm import LLM
from tramontane.engine.sampling_params import SamplingParams
from tramontane.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DataError,
    RequestError,
)
from tramontane.tokenizer.loading import load_tokenizer
from tramontane.train.flops import count_flops_per_token
from tramontane.train.held_out import measure_held_out
from tramontane.train.initialization import initialize_weights
from tramontane.train.loop import StepReport
from tramontane.train.pretrain import pretrain
from tramontane.train.pretrain_config import PretrainConfig, load_pretrain_config

WORDS = "the a cat dog sun moon saw met liked little big red blue and then one day".split()


class Recorder:
    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.notes: list[str] = []

    def on_step(self, report: StepReport, num_steps: int) -> None:
        self.reports.append(report)

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def write_corpus(path: Path, *, count: int = 60, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, 30)) + ".\n" for _ in range(count)]
    records = [
        {"text": text, "split": "valid" if i % 10 == 0 else "train"} for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    write_corpus(tmp_path / "tales.jsonl")
    write_corpus(tmp_path / "songs.jsonl", seed=1)
    config = make_config(vocab_size=290, max_seq_len=64).to_dict()
    return {
        "out": str(tmp_path / "run"),
        "data_dir": str(tmp_path),
        "sources": ["tales.jsonl:0.75", "songs.jsonl:0.25"],
        "seq_len": 64,
        "batch_size": 2,
        "dtype": "float32",
        "model": config,
        "loop": {"num_steps": 6, "save_every": 3, "eval_every": 3, "sample_every": 0},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
    }


def test_text_becomes_a_model_that_loads(settings: dict[str, Any]) -> None:
    recorder = Recorder()
    folder = pretrain(load_pretrain_config(None, settings), recorder)
    assert folder is not None
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    assert model.config.vocab_size == tokenizer.vocab_size == 290
    assert model.norm.weight.dtype == torch.bfloat16
    assert recorder.reports[-1].loss < recorder.reports[0].loss
    records = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    scores = [r["held_out_bits_per_byte"] for r in records if "held_out_bits_per_byte" in r]
    assert [set(s) for s in scores] == [{"tales", "songs"}] * 2
    assert scores[1]["tales"] < scores[0]["tales"]


def test_the_best_model_is_written_beside_the_last(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 scores best; its weights are those of a run that ends there."""
    scores = iter([2.0, 1.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr("tramontane.train.pretrain._score", lambda *_: {"tales": next(scores)})
    settings["loop"] |= {"num_steps": 6, "eval_every": 2, "save_every": 0}
    settings["optimizer"] |= {"schedule": "wsd", "decay_ratio": 0.1}
    recorder = Recorder()
    folder = pretrain(load_pretrain_config(None, settings), recorder)
    assert folder is not None
    assert "step 4 had the best score: 1.0000 bits per byte" in recorder.notes
    best = folder.with_name("best")
    stages = json.loads((best / "training.json").read_text())["stages"]
    assert (stages[0]["steps"], stages[0]["tokens"]) == (4, 4 * 128)
    assert pretrain(load_pretrain_config(None, settings), Recorder(), resume=True) is not None
    assert best.exists()  # written again, as nothing else is better
    settings["out"] = str(Path(settings["out"]).with_name("short"))
    settings["loop"]["num_steps"] = 4
    short = pretrain(load_pretrain_config(None, settings), Recorder())
    assert short is not None
    assert not short.with_name("best").exists()
    ours, theirs = load_model(best).state_dict(), load_model(short).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_runs_can_share_the_encoded_text(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["tokens_dir"] = str(tmp_path / "shared")
    pretrain(load_pretrain_config(None, settings), Recorder())

    def list_times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").rglob("*.bin")}

    before = list_times()
    assert len(before) == 4
    settings |= {"tokenizer": str(Path(settings["out"]) / "tokenizer"), "out": str(tmp_path / "b")}
    pretrain(load_pretrain_config(None, settings), Recorder())
    assert before == list_times()
    assert not (tmp_path / "b" / "tokens").exists()


def test_mfu_and_memory_are_reported(settings: dict[str, Any]) -> None:
    """By a peak that is stated; the share of it follows from the time."""
    settings |= {"peak_tflops": 0.001}
    recorder, config = Recorder(), load_pretrain_config(None, settings)
    pretrain(config, recorder, free_memory=2**34)
    flops, report = count_flops_per_token(config.model, seq_len=64), recorder.reports[-1]
    assert report.mfu == pytest.approx(report.num_units * flops / report.seconds / 1e9)
    assert any(note.startswith("MFU is of 0.00 TFLOP/s; ") for note in recorder.notes)
    assert any(note.startswith("memory: about ") for note in recorder.notes)
    settings["out"] += "-again"
    with pytest.raises(CapacityError, match="alone do not fit"):
        pretrain(load_pretrain_config(None, settings), Recorder(), free_memory=2**20)
    with pytest.raises(ConfigError, match=r"peak_tflops is -1"):
        load_pretrain_config(None, settings | {"peak_tflops": -1.0})


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resumed_in_bf16_equals_the_unbroken_run(settings: dict[str, Any], dropout: float) -> None:
    """T01: through the files, with bf16 computation and fp32 masters."""
    settings |= {"dtype": "bfloat16", "dropout": dropout}
    whole = pretrain(load_pretrain_config(None, settings), Recorder())
    out = Path(settings["out"])
    out.rename(out.with_name("whole"))
    pretrain(load_pretrain_config(None, settings), Recorder())
    shutil.rmtree(out / "checkpoints" / "step-6")  # as after a kill between the two checkpoints
    resumed = pretrain(load_pretrain_config(None, settings), Recorder(), resume=True)
    assert resumed is not None
    assert whole is not None
    ours = load_model(resumed).state_dict()
    theirs = load_model(out.with_name("whole") / "model").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["switch", "biased_top_k", "sparse_mixer_v2"])
def test_models_with_other_routers_are_trained_saved_and_resumed(
    settings: dict[str, Any], name: str
) -> None:
    """T01, S-17: from settings as in a TOML file, a residual pyramid, to a folder that loads."""
    settings["dtype"] = "bfloat16"
    settings["model"]["moe"] = {
        "num_experts": 8, "num_experts_per_tok": 1 if name == "switch" else 2, "router": name,
        "residual": True, "layer_experts": [4, 8],
    }  # fmt: skip
    config = load_pretrain_config(None, settings)
    whole = pretrain(config, Recorder())
    assert whole is not None
    out = Path(settings["out"])
    out.rename(out.with_name("whole"))
    pretrain(config, Recorder())
    shutil.rmtree(out / "checkpoints" / "step-6")
    resumed = pretrain(config, Recorder(), resume=True)
    assert resumed is not None
    model = load_model(resumed)
    theirs = load_model(out.with_name("whole") / "model").state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())
    assert model.config == config.model
    if name == "biased_top_k":
        assert model.layers[1].feed_forward.gate.expert_bias.abs().max() > 0
    llm, params = LLM(resumed), SamplingParams(max_tokens=5, temperature=0)
    assert llm.generate("the cat", params).num_completion_tokens > 0
    with pytest.raises(RequestError, match=f"this model's router is '{name}'"):
        llm.generate("the cat", replace(params, experts_per_token=2))


def test_dense_layers_between_sparse_ones_are_trained(settings: dict[str, Any]) -> None:
    """S-19: from scratch, or upcycled in some layers only. Health and loads are of all layers."""
    settings["model"]["moe"] = {"layer_experts": [1, 8]}
    trained = pretrain(load_pretrain_config(None, settings), Recorder())
    assert trained is not None
    assert load_model(trained).config.moe == MoeConfig(layer_experts=(1, 8))
    records = map(json.loads, (trained.parent / "log.jsonl").read_text().splitlines())
    *_, router = (record["router"] for record in records if "router" in record)
    assert [len(load) for load in router["load"]] == [1, 8]
    assert router["experts_per_token"] == [1.0, 2.0]
    assert (router["entropy"][0], router["dead"][0]) == (1.0, 0)


def test_resume_refuses_changed_settings(settings: dict[str, Any]) -> None:
    """T31."""
    pretrain(load_pretrain_config(None, settings), Recorder())
    changed = load_pretrain_config(None, settings | {"seed": 2, "batch_size": 3})
    with pytest.raises(ConfigError, match="batch_size: 2 -> 3; seed: 1 -> 2"):
        pretrain(changed, Recorder(), resume=True)


def test_a_setting_that_the_run_does_not_know_yet_has_its_default(settings: dict[str, Any]) -> None:
    """T31: a run that an earlier version began goes on."""
    pretrain(load_pretrain_config(None, settings), Recorder())
    path = Path(settings["out"]) / "config.json"
    saved = json.loads(path.read_text())
    del saved["tokens_dir"], saved["loop"]["keep_best"]
    path.write_text(json.dumps(saved))
    pretrain(load_pretrain_config(None, settings), Recorder(), resume=True)
    path.write_text(json.dumps(saved))
    settings["loop"]["keep_best"] = False
    with pytest.raises(ConfigError, match=r"loop\.keep_best: True -> False"):
        pretrain(load_pretrain_config(None, settings), Recorder(), resume=True)


def test_changed_text_is_refused_even_with_override(settings: dict[str, Any]) -> None:
    """T31: the order of documents cannot be continued."""
    pretrain(load_pretrain_config(None, settings), Recorder())
    write_corpus(Path(settings["data_dir"]) / "songs.jsonl", seed=7)
    settings["loop"]["num_steps"] = 8
    with pytest.raises(DataError, match="songs"):
        pretrain(load_pretrain_config(None, settings), Recorder(), resume=True, override=True)


def test_config_file_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'out = "o"\nsources = ["a.txt"]\nvocab_size = 300\n'
        '[model]\npreset = "tramontane-23m"\nn_layers = 1\n[optimizer]\n'
        "lr = 0.5\nbetas = [0.8, 0.9]"
    )
    config = load_pretrain_config(path, {"optimizer": {"lr": 0.25}, "model": {"hidden_dim": 32}})
    assert config.optimizer.lr == 0.25
    assert config.optimizer.betas == (0.8, 0.9)
    assert (config.model.n_layers, config.model.hidden_dim) == (1, 32)
    assert config.model.vocab_size == 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sorces = []", "unknown keys in .*sorces"),
        ("[loop]\nnum_step = 3", r"unknown keys in \[loop\]: \['num_step'\]"),
        ("[optimizer]\nlr = 0.0", "lr is 0.0"),
        ("out = 3 4", "cannot be read"),
        ('[model]\npreset = "gpt"', "no preset named 'gpt'"),
        ("seq_len = 4096", "seq_len is 4096, above"),
        ('dtype = "float16"', "dtype is 'float16'"),
        ('optimizer = "muon"', r"optimizer is 'muon'; write a table, \[optimizer\]"),
        ("[optimizer]\nmax_grad_norm = -1.0", "max_grad_norm is -1.0"),
        ("[optimizer]\nbetas = [0.9]", "betas is"),
    ],
)
def test_bad_config_files_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    base = 'out = "o"\nsources = ["a.txt"]\n'
    model = "" if "[model]" in text else '\n[model]\npreset = "tramontane-23m"\n'
    path.write_text(text + model if text.startswith("out") else base + text + model)
    with pytest.raises(ConfigError, match=message):
        load_pretrain_config(path, {})


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml does not exist"):
        load_pretrain_config(tmp_path / "nowhere.toml", {})


def test_vocabulary_has_to_fit(settings: dict[str, Any], tmp_path: Path) -> None:
    pretrain(load_pretrain_config(None, settings), Recorder())
    settings["tokenizer"] = str(Path(settings["out"]) / "tokenizer")
    settings["out"] = str(tmp_path / "other")
    settings["model"]["vocab_size"] = 300
    with pytest.raises(ConfigError, match="290 tokens, but the model's vocab_size is 300"):
        pretrain(load_pretrain_config(None, settings), Recorder())


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first, second, third = make_model(), make_model(), make_model()
    initialize_weights(first, seed=1)
    torch.rand(7)  # the global generator plays no part
    initialize_weights(second, seed=1)
    initialize_weights(third, seed=2)
    assert torch.equal(first.output.weight, second.output.weight)
    assert not torch.equal(first.output.weight, third.output.weight)
    assert first.output.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert first.layers[0].attention.wo.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(first.norm.weight, torch.ones(64))


def test_bits_per_byte_by_hand() -> None:
    """Two documents of 3 and 2 targets, 10 bytes in all: summed -log2 p over bytes."""
    model = make_model()
    tokens = np.array([1, 9, 8, 2, 1, 7, 2], dtype=np.uint16)
    file = TokenFile("tales", "valid", "", tokens, np.array([0, 4, 7]), np.array([6, 4]))
    score = measure_held_out(model, {"tales": file}, seq_len=16, max_tokens=100)["tales"]
    nats = 0.0
    for document in (tokens[:4], tokens[4:]):
        ids = torch.from_numpy(document.astype(np.int64))
        logits = model.compute_logits(model.forward_packed(ids[:-1], (len(ids) - 1,)).hidden)
        nats += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 10, rel=1e-5)
    assert (score.num_tokens, score.num_bytes) == (5, 10)
    assert [sum(layer.shares) for layer in score.layers] == pytest.approx([1.0, 1.0])


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="seq_len"):
        PretrainConfig(out="o", sources=("a.txt",), model=make_config(), seq_len=0)
    with pytest.raises(ConfigError, match=r"average_start is 0.5, but the run begins with random"):
        PretrainConfig(out="o", sources=("a.txt",), model=make_config(), average_start=0.5)
    with pytest.raises(ConfigError, match=r"average_start is -0.1; it must be"):
        PretrainConfig(out="o", sources=("a.txt",), model=make_config(), average_start=-0.1)
    with pytest.raises(ConfigError, match=r"dropout is 1.0; it must be at least 0 and below 1"):
        PretrainConfig(out="o", sources=("a.txt",), model=make_config(), dropout=1.0)


def test_an_unusable_device_is_named(settings: dict[str, Any]) -> None:
    config = load_pretrain_config(None, settings | {"device": "abacus"})
    with pytest.raises(ConfigError, match="device is 'abacus'"):
        pretrain(config, Recorder())


def test_going_on_from_a_model(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its weights, its tokenizer, its configuration, and its history, which grows by a stage."""
    first = pretrain(load_pretrain_config(None, settings), Recorder())
    assert first is not None
    again = {key: value for key, value in settings.items() if key != "model"}
    again |= {"init_from": str(first), "out": str(tmp_path / "again"), "seed": 2}
    recorder = Recorder()
    second = pretrain(load_pretrain_config(None, again), recorder)
    assert second is not None
    assert recorder.reports[0].loss < 5.0  # a random model has log(290) = 5.7
    assert load_tokenizer(second).to_json() == load_tokenizer(first).to_json()
    stages = json.loads((second / "training.json").read_text())["stages"]
    assert [(stage["steps"], stage["seed"]) for stage in stages] == [(6, 1), (6, 2)]
    assert stages[0] == json.loads((first / "training.json").read_text())["stages"][0]
    assert stages[1]["tokens_per_step"] == 128
    assert 0 < stages[1]["tokens"] <= 6 * 128


@pytest.mark.parametrize("router", ["top_k", "biased_top_k"])
def test_the_finished_model_can_be_the_mean_with_the_start(
    settings: dict[str, Any], tmp_path: Path, router: str
) -> None:
    settings["model"]["moe"]["router"] = router
    start = pretrain(load_pretrain_config(None, settings), Recorder())
    again = settings | {"init_from": str(start), "seed": 2}
    folders = {}
    for share in (0.0, 0.25):
        out, recorder = str(tmp_path / f"mean{share}"), Recorder()
        config = load_pretrain_config(None, again | {"out": out, "average_start": share})
        folders[share] = pretrain(config, recorder)
        notes = [note for note in recorder.notes if note.startswith("the mean with the model")]
        assert len(notes) == (share > 0)
    before, plain, mean = (
        load_model(folder, dtype=torch.float32).state_dict()
        for folder in (start, folders[0.0], folders[0.25])
    )
    for name, tensor in mean.items():
        expected = 0.25 * before[name] + 0.75 * plain[name]
        rounding = plain[name].abs().max().item() / 128  # all three are bf16
        torch.testing.assert_close(tensor, expected, rtol=0, atol=rounding)
    assert any(not torch.equal(plain[name], mean[name]) for name in mean)


def test_going_on_from_another_model_than_asked_for(settings: dict[str, Any]) -> None:
    first = pretrain(load_pretrain_config(None, settings), Recorder())
    settings["model"]["n_layers"] = 3
    with pytest.raises(ConfigError, match=r"not the one asked for \(n_layers: 2 -> 3\)"):
        load_pretrain_config(None, settings | {"init_from": str(first)})


def test_a_damaged_history_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    first = pretrain(load_pretrain_config(None, settings), Recorder())
    assert first is not None
    (first / "training.json").write_text("{}")
    again = settings | {"init_from": str(first), "out": str(tmp_path / "again")}
    with pytest.raises(CheckpointError, match=r"training\.json"):
        pretrain(load_pretrain_config(None, again), Recorder())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx512_bf16": False, "avx512_f": True}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"bf16": True}, "bfloat16"),
    ],
)
def test_auto_dtype_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], flags: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    settings |= {"dtype": "auto", "device": "cpu"}
    settings["loop"] |= {"num_steps": 1, "eval_every": 0}
    recorder = Recorder()
    pretrain(load_pretrain_config(None, settings), recorder)
    assert any(f"torch.{expected} computation" in note for note in recorder.notes)
