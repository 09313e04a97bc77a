import json

import pytest

from tests.model_folder import save_tiny_model
from tramontane.cli import doctor, machine
from tramontane.cli.instruction_sets import explain_speed, find_instruction_sets
from tramontane.cli.main import run_command


def test_text_names_machine_versions_and_consequences(capsys):
    assert run_command(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("Python", "torch", "usable cores", "memory", "threads", "kernels", "instructions"):
        assert word in out
    assert "bundled model" in out
    assert "memory bandwidth" in out


def test_json_has_the_same_facts(capsys):
    assert run_command(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"]
    assert report["cpu"]["usable_cores"] >= 1
    assert report["torch"]["threads"] >= 1
    assert report["torch"]["kernels"] in ("native", "fused", "reference")
    assert report["advice"]


@pytest.fixture
def bundled_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "BUNDLED_MODEL", tmp_path / "assets")
    monkeypatch.setattr("tramontane.engine.bundled.BUNDLED_MODEL", tmp_path / "assets")
    return tmp_path / "assets"


def test_bundled_model_is_described(bundled_folder):
    save_tiny_model(bundled_folder)
    report = doctor.build_report()
    assert report["bundled_model"]["parameters"] > report["bundled_model"]["active_parameters"]
    assert "context 256 tokens" in doctor.format_report(report)


def test_missing_bundled_model_is_said(bundled_folder):
    report = doctor.build_report()
    assert not report["bundled_model"]["is_there"]
    text = doctor.format_report(report)
    assert f"missing from {bundled_folder}" in text
    assert "needs a model folder" in text


def test_missing_torch_is_said(monkeypatch):
    real = doctor._find_version
    monkeypatch.setattr(doctor, "_find_version", lambda n: None if n == "torch" else real(n))
    assert "pip install torch" in doctor.format_report(doctor.build_report())


def test_threads_that_do_not_match_the_cores(monkeypatch):
    monkeypatch.setattr(doctor, "count_usable_cores", lambda: 1000)
    assert "OMP_NUM_THREADS=1000" in doctor.format_report(doctor.build_report())


def test_unknown_instruction_sets(monkeypatch):
    monkeypatch.setattr(doctor, "read_cpu_flags", lambda: None)
    assert "unknown on this system" in doctor.format_report(doctor.build_report())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"amx_bf16", "avx512_bf16", "avx2"}, "AMX"),
        ({"avx512_bf16", "avx512f"}, "of its own"),
        ({"avx2"}, "no instructions for bf16"),
        ({"asimd", "bf16"}, "of its own"),
    ],
)
def test_what_the_flags_mean(flags, expected):
    assert expected in explain_speed(find_instruction_sets(flags))[0]


def test_tables_of_proc(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("model name\t: One\nflags\t\t: avx2 fma\n\nmodel name\t: Two\n")
    assert machine._read_colon_table(path) == {"model name": "One", "flags": "avx2 fma"}
    assert machine._read_colon_table(tmp_path / "none") == {}


def test_peak_memory_is_plausible():
    assert 2**24 < machine.read_peak_memory() < 2**40


def test_bytes_for_people():
    assert machine.format_bytes(3 * 2**30) == "3.0 GiB"
    assert machine.format_bytes(5 * 2**20) == "5 MiB"
