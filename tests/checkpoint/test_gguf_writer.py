"""What a GGUF cannot hold is refused before it is there."""

import gc
import os
import warnings
from pathlib import Path

import pytest
import torch

from tests.checkpoint.layouts import save_hf
from tests.model_folder import VOCAB_SIZE, make_tokenizer
from tests.tiny import make_config, make_model
from tramontane.checkpoint.assembly import convert_values
from tramontane.checkpoint.gguf_writer import write_gguf
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.parameters import ParametersInMemory, StoredParameters
from tramontane.errors import CheckpointError
from tramontane.tokenizer.gguf_vocabulary import describe_for_gguf


@pytest.mark.parametrize("num_rows", [VOCAB_SIZE - 1, VOCAB_SIZE + 1])
def test_f9_tokens_and_rows_have_to_be_as_many(tmp_path: Path, num_rows: int) -> None:
    model = make_model(make_config(vocab_size=num_rows))
    with pytest.raises(CheckpointError, match=rf"259 tokens, the embeddings {num_rows} rows"):
        write_gguf(
            ParametersInMemory(model.state_dict()), model.config, tmp_path / "m.gguf",
            encoding="F32", metadata=describe_for_gguf(make_tokenizer()),
        )  # fmt: skip
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_no_file_open(tmp_path: Path) -> None:
    model = make_model()
    model.norm.weight.data[0] = float("nan")
    checkpoint = open_checkpoint(save_hf(model, tmp_path / "m"))
    parameters = StoredParameters(checkpoint.pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that are not"):
            write_gguf(parameters, checkpoint.config, tmp_path / "m.gguf", encoding="F32")
        gc.collect()
    assert os.listdir(tmp_path) == ["m"]


def test_f21_numbers_that_become_infinite_are_refused() -> None:
    largest = torch.tensor([1.0, -3.4e38])
    assert torch.equal(convert_values(largest, torch.float32, name="x"), largest)
    with pytest.raises(CheckpointError, match=r"x has values beyond bf16 \(3\.4e\+38\); write F32"):
        convert_values(largest, torch.bfloat16, name="x")
    with pytest.raises(CheckpointError, match=r"x has values beyond fp16 \(65536\); write BF16"):
        convert_values(torch.tensor([65536.0]).bfloat16(), torch.float16, name="x")
