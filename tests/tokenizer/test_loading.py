"""Which file of a folder counts; hostile files give TokenizerError and nothing else."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.tokenizer import vocabularies
from tramontane.errors import TokenizerError
from tramontane.tokenizer.json_tokenizer import JsonTokenizer
from tramontane.tokenizer.loading import load_tokenizer
from tramontane.tokenizer.sentence_piece import SentencePieceTokenizer
from tramontane.tokenizer.tokenizer import Tokenizer

TEXT = "<s>[INST] caf\u00e9 \U0001f600 </s> 12\n\n  x"


def test_tokenizer_json_goes_before_tokenizer_model(folder: Path, tmp_path: Path) -> None:
    shutil.copy(vocabularies.V1_FILE, tmp_path / "tokenizer.model")
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)
    assert load_tokenizer(tmp_path / "tokenizer.model").vocab_size == 32000


def test_f8_a_copy_of_the_model_gives_way_to_it(tmp_path: Path) -> None:
    """As published with Mixtral: both files are there and hold the same."""
    (tmp_path / "tokenizer.json").write_text(vocabularies.make_hub_json())
    assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)
    shutil.copy(vocabularies.V1_FILE, tmp_path / "tokenizer.model")
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SentencePieceTokenizer)
    assert loaded.encode(TEXT) == vocabularies.oracle().encode(TEXT)


def test_f8_another_tokenizer_json_goes_before_the_model(tmp_path: Path) -> None:
    """Fine-tunes add tokens or change rules in it, and leave the old model beside."""
    content = json.loads(vocabularies.make_hub_json())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {"id": 32000, "content": "<|im_end|>", "special": True, **flags}
    longer = content | {"added_tokens": [*content["added_tokens"], added]}
    ended = {"eos_token": "<|im_end|>"}
    cases = [
        (json.dumps(longer), {}, 2),
        (json.dumps(longer), ended, 32000),
        (vocabularies.make_hub_json(), {"eos_token": "<unk>"}, 0),
        (vocabularies.make_modern_json(), {}, 2),  # spaces otherwise after a control token
    ]
    for number, (text, config, eos_id) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(vocabularies.V1_FILE, folder / "tokenizer.model")
        (folder / "tokenizer.json").write_text(text)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        loaded = load_tokenizer(folder)
        assert isinstance(loaded, JsonTokenizer)
        assert loaded.eos_id == eos_id


@pytest.mark.parametrize("names", [["tokenizer.model"], ["x.model.v1", "x.model.v3"]])
def test_f8_what_is_no_model_beside_a_tokenizer_json_is_left_alone(
    folder: Path, tmp_path: Path, names: list[str]
) -> None:
    """Another kind of file (tiktoken's has this name too), or several."""
    shutil.copy(folder / "tokenizer.json", tmp_path)
    for name in names:
        (tmp_path / name).write_text("IQ== 0\nIg== 1\n")
    assert load_tokenizer(tmp_path).vocab_size == 330


def test_whether_texts_start_with_bos_is_read_and_written(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizers = [tokenizer, load_tokenizer(vocabularies.V1_FILE)]
    for number, original in enumerate(tokenizers):
        for adds_bos in (True, False):
            original.adds_bos, path = adds_bos, tmp_path / f"{number}-{adds_bos}"
            original.save(path)
            assert load_tokenizer(path).adds_bos == adds_bos
            theirs = AutoTokenizer.from_pretrained(path)
            if number:
                assert (theirs("a").input_ids[0] == theirs.bos_token_id) == adds_bos
        original.adds_bos = True


def test_numbered_models_are_found_and_not_guessed_between(tmp_path: Path) -> None:
    shutil.copy(vocabularies.V3_FILE, tmp_path / "tokenizer.model.v3")
    assert load_tokenizer(tmp_path).vocab_size == 32768
    shutil.copy(vocabularies.V1_FILE, tmp_path / "tokenizer.model.v1")
    with pytest.raises(TokenizerError, match=r"model\.v1, tokenizer\.model\.v3: name the one"):
        load_tokenizer(tmp_path)


def test_tekken_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    for path in (tmp_path, tmp_path / "tekken.json"):
        with pytest.raises(TokenizerError, match=r"tekken\.json is a Tekken.*tokenizer\.json"):
            load_tokenizer(path)


def test_other_names_of_control_tokens_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"<s>"', '"<|begin|>"').replace('"</s>"', '"<|end|>"'))
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_token, loaded.eos_token) == ("<|begin|>", "<|end|>")
    assert not set(loaded.encode("<|begin|><|end|>")) & {1, 2}
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match=r"'<s>': name its bos_token in tokenizer_config"):
        load_tokenizer(tmp_path)


def test_code_named_by_auto_map_never_runs(folder: Path, tmp_path: Path) -> None:
    """C02."""
    shutil.copytree(folder, tmp_path / "m")
    canary = tmp_path / "canary"
    (tmp_path / "m" / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Tok: pass\n")
    path = tmp_path / "m" / "tokenizer_config.json"
    auto = {"auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}, "tokenizer_class": "evil.Tok"}
    path.write_text(json.dumps(json.loads(path.read_text()) | auto))
    assert load_tokenizer(tmp_path / "m").encode("hi")
    assert not canary.exists()


def test_a_merge_cannot_spell_a_control_token() -> None:
    """A05: "<s" and ">" may not join to <s>, whatever the file says."""
    content = json.loads(vocabularies.make_hub_json())
    vocab = content["model"]["vocab"]
    vocab["<s"] = len(vocab)
    content["model"]["merges"][:0] = [["<", "s"], ["<s", ">"]]
    tokenizer = JsonTokenizer.from_json(json.dumps(content), origin="x")
    ids = tokenizer.encode("<s>")
    assert 1 not in ids
    assert vocab["<s"] in ids
    assert tokenizer.decode(ids) == "<s>"


def test_truncation_and_padding_of_the_file_do_not_apply(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.to_json())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                             "stride": 0}  # fmt: skip
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0,
                          "pad_to_multiple_of": None, "pad_type_id": 0,
                          "pad_token": "<unk>"}  # fmt: skip
    read = JsonTokenizer.from_json(json.dumps(content), origin="x")
    assert read.encode_batch(["a", TEXT]) == tokenizer.encode_batch(["a", TEXT])


def test_a_vocabulary_that_cannot_write_every_text_is_refused(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.to_json())
    vocab = content["model"]["vocab"]
    vocab["zz"] = vocab.pop("a")
    content["model"]["merges"] = []
    with pytest.raises(TokenizerError, match="no token for byte 97"):
        JsonTokenizer.from_json(json.dumps(content), origin="x")
    content = json.loads(vocabularies.make_hub_json())
    content["model"]["vocab"]["zzqq"] = content["model"]["vocab"].pop("<0x0A>")
    with pytest.raises(TokenizerError, match="no token for byte 10"):
        JsonTokenizer.from_json(json.dumps(content), origin="x")


@pytest.mark.parametrize("junk", [b"", b"junk", b"\n\x05hello", b"\x00" * 99, b"{", b"[]", b"{}"])
def test_junk_is_refused_by_name(tmp_path: Path, junk: bytes) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        path = tmp_path / name
        path.write_bytes(junk)
        with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
            load_tokenizer(path)
    with pytest.raises(TokenizerError, match="cannot read"):
        load_tokenizer(tmp_path / "absent.model")


def mutate_json(rng: random.Random, text: str) -> bytes:
    """One to four bytes changed, cut, doubled, or a word of the format put anywhere."""
    data = bytearray(text.encode())
    words = [
        b"null",
        b"-1",
        b"99999999999",
        b'"',
        b"[",
        b"{}",
        b'"special": true',
        b"1e400",
        b"<s>",
    ]
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data)), rng.choice([1, 1, 2, 9, 200])
        kind = rng.randrange(4)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + size]
        elif kind == 2:
            data[at:at] = data[at : at + size]
        else:
            data[at : at + size] = rng.choice(words)
        if not data:
            return b""
    return bytes(data)


def mutate_structure(rng: random.Random, text: str) -> bytes:
    """A value somewhere in the parsed file becomes another: the rest stays valid JSON."""
    content = json.loads(text)
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = rng.choice(keys)
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.1:
            break
        node = node[key]
    node[key] = rng.choice([None, -1, 2**40, 1.5, "", "<s>", "x y", [], {}, True, [["a", "b"]]])
    return json.dumps(content).encode()


def survive(path: Path) -> bool:
    try:
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode(TEXT)
        tokenizer.decode(ids)
    except TokenizerError:
        return False
    assert not set(ids) & set(tokenizer.control_ids.values())
    return True


def attack(tokenizer: Tokenizer, path: Path, count: int) -> int:
    text = tokenizer.to_json()
    mutators: list[Callable[[random.Random, str], bytes]] = [mutate_json, mutate_structure]
    survivors = 0
    for seed in range(count):
        rng = random.Random(seed)
        path.write_bytes(mutators[seed % 2](rng, text))
        survivors += survive(path)
    return survivors


def test_mutated_tokenizer_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """C02: some are still tokenizers, the others give TokenizerError, and none crashes."""
    assert 0 < attack(tokenizer, tmp_path / "tokenizer.json", 300) < 300


@pytest.mark.slow
def test_many_mutated_tokenizer_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """C02."""
    assert 0 < attack(tokenizer, tmp_path / "tokenizer.json", 10_000) < 10_000


def test_mutated_sentence_piece_models(tmp_path: Path) -> None:
    """C02."""
    original = vocabularies.V1_FILE.read_bytes()
    rng = random.Random(0)
    for _ in range(40):
        data = bytearray(original)
        for _ in range(rng.randint(1, 30)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(data[: rng.choice([len(data), 5000])])
        survive(tmp_path / "tokenizer.model")
