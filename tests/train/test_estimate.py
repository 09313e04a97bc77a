"""T25: what training needs, against what it then takes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import make_config, make_model
from tests.train.test_kill import write_inputs
from tramontane.config import MoeConfig, get_preset
from tramontane.data.packing import PackedBatch
from tramontane.errors import CapacityError
from tramontane.train.estimate import (
    TrainingMemory,
    estimate_training_memory,
    require_memory,
)
from tramontane.train.losses import compute_next_token_loss
from tramontane.train.optim import MasterOptimizer, OptimizerConfig

GROUPS = Path("/sys/fs/cgroup/memory")


def count_bytes(tensors: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("moe", [MoeConfig(), None])
def test_weights_and_optimizer_are_exact(kind: str, tie: bool, moe: MoeConfig | None) -> None:
    config = make_config(tie_embeddings=tie, moe=moe)
    model = make_model(config)
    optimizer = MasterOptimizer(model, OptimizerConfig(kind=kind))
    model.to(torch.bfloat16)
    need = estimate_training_memory(config, rows=1, seq_len=8, bytes_per_value=2, optimizer=kind)
    assert need.weights == count_bytes(model.parameters())
    assert need.optimizer == count_bytes(optimizer.state_tensors().values())
    assert need.gradients == 3 * need.weights


@pytest.mark.parametrize(
    "moe", [MoeConfig(), MoeConfig(num_experts=4, num_experts_per_tok=1), None]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "seq_len"), [(2, 512), (32, 32), (1, 32)])
def test_activations_are_what_autograd_keeps(
    moe: MoeConfig | None, dtype: torch.dtype, rows: int, seq_len: int
) -> None:
    """Bytes of all saved tensors but the weights, and room for what the backward pass adds."""
    config = make_config(moe=moe, max_seq_len=seq_len, n_layers=3, vocab_size=512)
    model = make_model(config).to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = np.random.default_rng(0).integers(0, 512, rows * seq_len)
    batch = PackedBatch(tokens, tokens, (seq_len,) * rows, ("a",) * rows)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = compute_next_token_loss(model, batch)
    assert terms.objective.requires_grad
    need = estimate_training_memory(
        config, rows=rows, seq_len=seq_len, bytes_per_value=dtype.itemsize, optimizer="adamw"
    )
    assert 1.0 < need.activations / sum(kept.values()) < 1.8


def test_what_does_not_fit_is_refused_and_what_may_not_is_said() -> None:
    need = TrainingMemory(weights=2**30, optimizer=2**31, gradients=2**30, activations=2**32)
    assert "8.12 GiB (weights 1.00 GiB, optimizer 2.00 GiB" in require_memory(need, None)
    assert require_memory(need, 2**34).endswith("; 16.00 GiB free")
    assert "may be killed; lower batch_size or seq_len" in require_memory(need, 2**33)
    with pytest.raises(CapacityError, match=r"3\.99 GiB free: .*alone do not fit"):
        require_memory(need, 2**32 - 2**23)


def test_mixtral_on_one_machine_is_refused_before_anything_is_built() -> None:
    need = estimate_training_memory(
        get_preset("mixtral-8x7b"), rows=1, seq_len=1024, bytes_per_value=2, optimizer="adamw"
    )
    assert need.fixed == 46_702_792_704 * (2 + 12 + 6)
    with pytest.raises(CapacityError):
        require_memory(need, 24 * 2**30)


@pytest.mark.slow
@pytest.mark.skipif(not (GROUPS / "memory.limit_in_bytes").exists(), reason="no cgroup v1")
def test_t25_a_control_group_of_512_mib(tmp_path: Path) -> None:
    """The process lies in a group with a limit of its own: said before the first step."""
    write_inputs(tmp_path)
    group = GROUPS / f"tramontane-test-{tmp_path.name}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("this user cannot make control groups")
    try:
        (group / "memory.limit_in_bytes").write_text(str(512 * 2**20))
        fits = _train_in(group, tmp_path, "--steps", "1")
        assert fits.returncode == 0, fits.stderr
        (free,) = re.findall(r"memory: about .*; (\d+) MiB free\n", fits.stderr)
        assert 100 < int(free) < 512
        may_not = _train_in(group, tmp_path, "--steps", "1", "--batch-size", "1024")
        assert "the run may be killed; lower batch_size" in may_not.stderr
        never = _train_in(group, tmp_path, "--model", "tramontane-23m", "--vocab-size", "60000")
        assert never.returncode == 1, never.stderr
        assert "weights, optimizer and gradients alone do not fit" in never.stderr
    finally:
        group.rmdir()


def _train_in(group: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """`tramontane train` of a toy, as far as `flags` do not say otherwise, in a control group."""
    program = (
        "import os, sys; open(sys.argv.pop(1), 'w').write(str(os.getpid()));"
        "from tramontane.cli.main import main; main()"
    )
    shutil.rmtree(folder / "run", ignore_errors=True)
    preset = () if "--model" in flags else (str(folder / "run.toml"), "--vocab-size", "262")
    arguments = [
        str(group / "cgroup.procs"), "train", *preset, "--source", str(folder / "tales.jsonl"),
        "--out", str(folder / "run"), "--seq-len", "32", "--dtype", "float32", "--eval-every", "0",
        "--sample-every", "0", "--threads", "1", *flags,
    ]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
