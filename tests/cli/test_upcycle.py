"""`tramontane upcycle` and `tramontane ancestry`, from folder to folder."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoint.layouts import LAYOUTS
from tests.model_folder import save_tiny_model
from tests.tiny import make_config, make_model
from tramontane.checkpoint.loader import load_model
from tramontane.cli.main import run_command
from tramontane.engine.llm import LLM
from tramontane.engine.sampling_params import SamplingParams

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "dense", generation_config='{"temperature": 0.5}', moe=None)


def read_change(out: str) -> float:
    (change,) = re.findall(r"max \|logits change\| at step 0: (\S+) ", out)
    return float(change)


@pytest.mark.parametrize("flags", [[], ["--virtual-groups", "2"], ["--router-init", "zeros"]])
def test_t08_a_folder_that_transformers_reads(
    dense: Path, tmp_path: Path, flags: list[str], capsys: Captured
) -> None:
    """T08: the change that is printed, and the same logits in transformers."""
    out = tmp_path / "moe"
    assert run_command(["upcycle", str(dense), str(out), *flags]) == 0
    captured = capsys.readouterr()
    assert read_change(captured.out) <= 1e-5
    assert "wrote" in captured.err
    tokens = torch.arange(3, 67)[None]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (dense, out)
        )
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "mixtral"
    assert (out / "generation_config.json").read_text() == '{"temperature": 0.5}'
    stage = json.loads((out / "training.json").read_text())["stages"][-1]
    assert stage["upcycled"]["num_experts"] == 8
    params = SamplingParams(max_tokens=8, temperature=0.0)
    assert LLM(out).generate("Once", params).text == LLM(dense).generate("Once", params).text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_every_layout(layout: str, tmp_path: Path, capsys: Captured) -> None:
    model = make_model(make_config(moe=None))
    path = LAYOUTS[layout](model, tmp_path / "in")
    assert run_command(["upcycle", str(path), str(tmp_path / "out")]) == 0
    assert read_change(capsys.readouterr().out) <= 1e-5
    sparse = load_model(tmp_path / "out")
    copied = sparse.layers[1].feed_forward.experts.w2[3]
    torch.testing.assert_close(copied.float(), load_model(path).layers[1].feed_forward.w2.weight)


def test_with_dense_layers_it_runs_and_is_known_again(
    dense: Path, tmp_path: Path, capsys: Captured
) -> None:
    """S-19: experts in every second layer. It is no Mixtral, so the folder is of our own layout."""
    out = tmp_path / "moe"
    assert run_command(["upcycle", str(dense), str(out), "--layers", "every-2"]) == 0
    assert read_change(capsys.readouterr().out) <= 1e-5
    assert json.loads((out / "config.json").read_text())["model_type"] == "tramontane"
    params = SamplingParams(max_tokens=8, temperature=0.0)
    llm = LLM(out)
    completion = llm.generate("Once", params, collect_routing=True)
    assert completion.text == LLM(dense).generate("Once", params).text
    experts = completion.selected_experts
    assert experts is not None
    assert (experts[:, 0, 0] == 0).all()
    assert (experts[:, 0, 1] == -1).all()  # the only expert has no second beside it
    assert (experts[:, 1] >= 0).all()
    with_more = SamplingParams(max_tokens=4, temperature=0.0, experts_per_token=3)
    assert llm.generate("Once", with_more).num_completion_tokens == 4
    assert run_command(["ancestry", str(dense), str(out), "--units", "32"]) == 0
    assert "derived: 9 of 9 networks have the other model's units" in capsys.readouterr().out


def test_noise_is_seen_in_the_change(dense: Path, tmp_path: Path, capsys: Captured) -> None:
    assert run_command(["upcycle", str(dense), str(tmp_path / "moe"), "--noise", "0.2"]) == 0
    assert read_change(capsys.readouterr().out) > 1e-2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "every-other"], "layers is 'every-other'; choose all, every-2"),
        (["--layers", "1-2"], "the model has 2 layers, 0 to 1"),
        (["--virtual-groups", "3"], "num_experts is 8, no multiple of virtual_groups, 3"),
        (["--num-experts-per-tok", "9"], "there are only 8 experts"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    dense: Path, tmp_path: Path, flags: list[str], message: str, capsys: Captured
) -> None:
    assert run_command(["upcycle", str(dense), str(tmp_path / "moe"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


def test_existing_folders_and_mixtures_are_refused(
    dense: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert run_command(["upcycle", str(dense), str(dense)]) == 1
    assert "exists already" in capsys.readouterr().err
    sparse = save_tiny_model(tmp_path / "sparse")
    assert run_command(["upcycle", str(sparse), str(tmp_path / "again")]) == 1
    assert "a mixture of 8 experts already" in capsys.readouterr().err


def test_ancestry_of_what_was_upcycled(dense: Path, tmp_path: Path, capsys: Captured) -> None:
    out, stranger = tmp_path / "moe", tmp_path / "stranger"
    assert run_command(["upcycle", str(dense), str(out)]) == 0
    capsys.readouterr()
    assert run_command(["ancestry", str(dense), str(out), "--units", "32"]) == 0
    text = capsys.readouterr().out
    assert "derived: 16 of 16 networks have the other model's units, 100%" in text
    assert len([line for line in text.splitlines() if re.match(r" +[01] +1\.000", line)]) == 2
    assert run_command(["convert", str(out), str(stranger), "--to", "gguf"]) == 0
    capsys.readouterr()
    assert run_command(["ancestry", str(stranger), str(dense), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["verdict"] == "derived"
    assert (len(values["experts"]), len(values["attention"])) == (16, 2)
    assert run_command(["ancestry", str(dense), str(out), "--units", "0"]) == 1
    assert "--units is 0" in capsys.readouterr().err
