"""C04-C06, C31: nothing that is read before the weights takes more than the file and 16 MiB.

A vocabulary cannot be held to that; it has a bound of its own, which honest ones stay within.
"""

import sys
from pathlib import Path

import pytest

from tests.checkpoint.files import hostile, malformed_gguf
from tests.checkpoint.files.hostile import ACCEPTED, READERS, REFUSED
from tests.checkpoint.peak_memory import run_program
from tramontane.bounded_json import estimate_memory, parse_json
from tramontane.checkpoint.files.gguf_file import read_gguf
from tramontane.checkpoint.files.safetensors_file import read_table
from tramontane.checkpoint.side_files import check_side_files
from tramontane.errors import CheckpointError

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
LIMIT = 16 * 1024  # KiB


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_grow_is_refused(tmp_path: Path, name: str) -> None:
    """Before it is parsed; the message names the file and is short."""
    path = tmp_path / name
    path.write_bytes(REFUSED[name]())
    with pytest.raises(CheckpointError, match=r"memory|no model's has more than") as error:
        READERS[name.rpartition(".")[2]](path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500


@linux
def test_memory_stays_within_the_file_and_16_mib(tmp_path: Path) -> None:
    """Of those that are refused, and of the largest that are not."""
    hostile.write_good_files(tmp_path)
    for name, build in REFUSED.items():
        (tmp_path / f"refused {name}").write_bytes(build())
    for name in ACCEPTED:
        (tmp_path / f"accepted {name}").write_bytes(hostile.build_largest(name, tmp_path / name))
        (tmp_path / name).unlink()
    growth = run_program(hostile.__file__, str(tmp_path))
    assert len(growth) == len(REFUSED) + len(ACCEPTED)
    assert max(growth.values()) <= LIMIT, growth
    accepted = {name: size for name, size in growth.items() if name.startswith("accepted")}
    assert min(accepted.values()) > 1024, accepted  # the bounds are no caricature


@linux
def test_a_vocabulary_of_128_000_tokens_stays_within_its_bound(tmp_path: Path) -> None:
    """As large as Llama 3's: 128,000 tokens and 280,000 merges, 20 MB as it is written today."""
    hostile.write_good_files(tmp_path)
    content = hostile.build_vocabulary(128_000, 280_000)
    assert len(content) > 10 * 10**6
    (tmp_path / "tokenizer.json").write_bytes(content)
    check_side_files(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "large.vocabulary")
    growth = run_program(hostile.__file__, str(tmp_path))
    assert growth["large.vocabulary"] * 1024 < estimate_memory(content) < hostile.VOCABULARY_MEMORY


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json",
                                  "generation_config.json", "special_tokens_map.json"])  # fmt: skip
def test_files_beside_the_weights_are_looked_at_first(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"a":[' + b"[[]]," * 4_000_000 + b"1]}")
    with pytest.raises(CheckpointError, match=rf"{name} (could take|has 20,).*, and no|than"):
        check_side_files(tmp_path)
    (tmp_path / name).write_bytes(b'{"a": "\\u2581"}')
    check_side_files(tmp_path)


def test_a_header_of_99_megabytes_is_refused_at_once(tmp_path: Path) -> None:
    """C31: a million tensors, described in 99 MB."""
    entry = b'"model.layers.%06d.w":{"dtype":"BF16","shape":[1],"data_offsets":[%d,%d]}'
    entries = b",".join(entry % (i, 2 * i, 2 * i + 2) for i in range(10**6))
    header = b"{" + entries + b" " * (99 * 10**6 - len(entries)) + b"}"
    with (tmp_path / "f").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * 10**6)
    with pytest.raises(CheckpointError, match=r"could take .* bytes of memory when it is parsed"):
        read_table(tmp_path / "f")


def test_metadata_has_to_be_a_map_of_strings(tmp_path: Path) -> None:
    for wrong in (b"[]", b'{"a": 1}', b'{"a": {}}', b'"pt"', b"null"):
        (tmp_path / "f").write_bytes(hostile._metadata(wrong))
        with pytest.raises(CheckpointError, match="__metadata__ is no map of strings"):
            read_table(tmp_path / "f")
    (tmp_path / "f").write_bytes(hostile._metadata(b'{"format": "pt"}'))
    assert read_table(tmp_path / "f") == {}


def test_what_honest_files_have_is_read() -> None:
    """The index of 1,740 tensors of Mixtral 8x22B, and one of 20,000."""
    for count in (1740, 20_000):
        body = ",".join(f'"model.layers.{i}.block_sparse_moe.experts.1.w1.weight":'
                        '"model-00001-of-00059.safetensors"' for i in range(count))  # fmt: skip
        values = parse_json(b'{"weight_map":{' + body.encode() + b"}}", where="x")
        assert len(values["weight_map"]) == count


def test_a_gguf_with_the_vocabulary_of_llama_3_is_read(tmp_path: Path) -> None:
    """128,000 tokens and 280,000 merges, with embeddings of 256 values, which are a hole."""
    tokens = b"".join(malformed_gguf.text(f"\u0120{i:06x}") for i in range(128_000))
    merges = b"".join(malformed_gguf.text(f"\u0120{i:03x} {i:04x}") for i in range(280_000))
    content = malformed_gguf.encode(
        [
            malformed_gguf.array("tokens", malformed_gguf.STRING, tokens, 128_000),
            malformed_gguf.array("merges", malformed_gguf.STRING, merges, 280_000),
            malformed_gguf.array("types", malformed_gguf.I32, bytes(4 * 128_000), 128_000),
        ],
        [malformed_gguf.tensor("token_embd.weight", (256, 128_000), kind=1)],
        b"",
    )
    (tmp_path / "f").write_bytes(content)
    with (tmp_path / "f").open("r+b") as file:
        file.truncate(len(content) + 2 * 256 * 128_000)
    metadata = read_gguf(tmp_path / "f").metadata
    assert (len(metadata["tokens"]), len(metadata["merges"])) == (128_000, 280_000)
    assert metadata["merges"][-1] == f"\u0120{279_999:03x} {279_999:04x}"
