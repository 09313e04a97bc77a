"""S-38: bare listings of tensors, as people print and post them, and nothing that breaks on one."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.tiny import make_config
from tramontane.checkpoint.assembly import Assembly
from tramontane.checkpoint.inference import infer_model
from tramontane.checkpoint.listing import parse_listing
from tramontane.checkpoint.name_table import NameTable
from tramontane.checkpoint.names import GGUF, GGUF_EACH, HF, HF_FUSED, MISTRAL, TORRENT
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.checkpoint.summary import summarize
from tramontane.errors import CheckpointError

TABLES = [HF, HF_FUSED, MISTRAL, TORRENT, GGUF, GGUF_EACH]
Shapes = dict[str, tuple[int, ...]]


def list_shapes(table: NameTable = MISTRAL, **changes: Any) -> Shapes:
    config = make_config(n_heads=8, n_kv_heads=4, n_layers=4, **changes)
    return Assembly(table, config, ParametersInMemory({})).list_shapes()


FORMS: dict[str, Any] = {
    "name [shape] dtype": lambda n, s: f"{n}    {list(s)}  BF16",
    "torch.Size": lambda n, s: f"{n} torch.Size({list(s)}) torch.bfloat16",
    "quoted": lambda n, s: f"'{n}': {s}, bfloat16",
    "tuple of two": lambda n, s: f"('{n}', torch.Size({list(s)}), torch.bfloat16)",
    "table": lambda n, s: f"| {n} | bf16 | {s} |",
    "shape=": lambda n, s: f"{n}: shape={list(s)}, dtype=torch.bfloat16",
    "numbered": lambda n, s: f"12. {n}: {s} bfloat16",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_printed_listing_is_read(tmp_path: Path, form: Any) -> None:
    shapes = list_shapes()
    path = tmp_path / "any name.log"
    path.write_text("\n\n".join(form(name, shape) for name, shape in shapes.items()) + "\n")
    listing = parse_listing(path.read_bytes(), path=path)
    assert {name: tensor.shape for name, tensor in listing.items()} == shapes
    assert {tensor.encoding for tensor in listing.values()} == {"BF16"}
    summary = summarize(str(path))
    assert summary.problems == ()
    assert summary.bytes_by_encoding == {"BF16": 2 * summary.config.count_parameters().total}


@pytest.mark.parametrize("is_pretty", [True, False])
def test_a_dict_that_python_printed_is_read(tmp_path: Path, is_pretty: bool) -> None:
    shapes = list_shapes()
    text = repr(shapes).replace("), ", "),\n " if is_pretty else "), ")
    (tmp_path / "f").write_text(text)
    listing = parse_listing(text.encode(), path=tmp_path / "f")
    assert {name: tensor.shape for name, tensor in listing.items()} == shapes


def test_a_header_of_safetensors_is_read(tmp_path: Path) -> None:
    entries = {n: {"dtype": "F32", "shape": s, "data_offsets": [0, 1]}
               for n, s in list_shapes().items()}  # fmt: skip
    (tmp_path / "f.json").write_text(json.dumps({"__metadata__": {"format": "pt"}} | entries))
    summary = summarize(str(tmp_path / "f.json"))
    total = summary.config.count_parameters().total
    assert summary.bytes_by_encoding == {"F32": 4 * total}
    assert str(summary.dtype) == "torch.float32"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
@pytest.mark.parametrize("moe", [{}, {"moe": None}], ids=["mixtral", "mistral"])
def test_a_whole_model_has_no_problems(table: NameTable, moe: dict[str, Any]) -> None:
    inferred = infer_model(list_shapes(table, **moe))
    assert inferred.problems == ()
    config = make_config(n_heads=8, n_kv_heads=4, n_layers=4, **moe)
    assert inferred.config.count_parameters() == config.count_parameters()


def test_what_is_missing_extra_or_of_another_shape_is_a_problem(tmp_path: Path) -> None:
    shapes = list_shapes(HF)
    del shapes["model.layers.3.self_attn.v_proj.weight"]
    shapes["model.layers.1.self_attn.q_proj.bias"] = (128,)
    shapes["model.layers.2.mlp.extra"] = (1,)
    shapes["model.layers.2.input_layernorm.weight"] = (63,)
    inferred = infer_model(shapes)
    assert inferred.problems == (
        "model.layers.2.input_layernorm.weight has shape [63], expected [64]: hidden_size is 64 in "
        "the configuration, 63 in the tensor",
        "1 missing tensors: model.layers.3.self_attn.v_proj.weight",
        "2 unexpected tensors: model.layers.1.self_attn.q_proj.bias, model.layers.2.mlp.extra",
    )
    (tmp_path / "l").write_text("\n".join(f"{n} {list(s)}" for n, s in shapes.items()))
    assert summarize(str(tmp_path / "l")).problems == inferred.problems


def test_layers_that_are_left_out_are_a_problem() -> None:
    shapes = list_shapes()
    kept = {n: s for n, s in shapes.items() if not n.startswith(("layers.1.", "layers.2."))}
    inferred = infer_model(kept)
    assert inferred.config.n_layers == 4
    assert inferred.problems[0] == "2 layers are not there: 1 to 2"
    assert inferred.problems[1].startswith(f"{len(shapes) - len(kept)} missing tensors: layers.1.")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("layers.0.feed_forward.gate.weight", (), "has shape []; 2 dimensions belong there"),
        ("layers.0.feed_forward.gate.weight", (10**9, 64), "1,000,000,000 experts in 4 layers"),
        ("layers.999999999.ffn_norm.weight", (64,), "layer 999999999, which no model has"),
        ("layers.0.attention.wk.weight", (0, 64), "contradict each other"),
        ("tok_embeddings.weight", (128,), "2 dimensions belong there"),
    ],
)
def test_shapes_that_are_none_are_said(name: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        infer_model(list_shapes() | {name: shape})
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("norm.weight [64]\nhello world", r"f:2: 'hello world' is not a tensor's name and its sh"),
        (f"norm.weight [{'9' * 5000}]", r"f:1: norm.weight has the shape \[999"),
        (f"norm.weight [{'1, ' * 9}1]", r"f:1: norm.weight has the shape \[1, 1"),
        ("norm.weight [9999999999, 9999999999]", r"norm\.weight has shape .*, beyond any file"),
        ("norm.weight [64]\nnorm.weight [64]", r"f:2: norm\.weight is there twice"),
        ('{"norm.weight": ["64"]}', r"norm\.weight has no shape, but \['64'\]"),
        ('{"norm.weight": 64}', r"norm\.weight has no shape, but 64"),
        ('{"norm.weight": [64]', r"is not valid JSON"),
        ("x" * 300 + " [3]", r"of 300 characters; 1 to 256"),
        ("", r"no tensor is one of a Mistral or Mixtral, there are none at all"),
        ("blocks.0.filter.poles [4, 2, 1, 2]", r"the tensors of a StripedHyena, which tramontane"),
        ("\xe9", r"neither a checkpoint nor a listing"),
    ],
)
def test_what_is_no_listing_is_said(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "f").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=said) as error:
        summarize(str(tmp_path / "f"))
    assert str(tmp_path / "f") in str(error.value)
    assert len(str(error.value)) < 500


_WORDS = ["", "[", "]", "()", "[]", "[3]", "(3,)", "torch.Size([", "{", "}", ":", ",", "'", '"',
          "BF16", "\n", "\0", "\u2028", "[-1]", "[1.5]", "null", "[[3]]", "9" * 5000, "x" * 300,
          "layers.0.feed_forward.gate.weight", "layers.7.", "[0]", "[999999999999, 9999999]",
          "tok_embeddings.weight [128, 64]"]  # fmt: skip


def _mutate(lines: list[str], random: Random) -> str:
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(lines))
        line, kind = lines[at], random.randrange(5)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, random.choice(lines))
        elif kind == 2:
            cut = random.randrange(len(line) + 1)
            lines[at] = line[:cut] + random.choice(_WORDS) + line[cut + random.randrange(9) :]
        elif kind == 3:
            lines[at] = line.replace(line.rpartition(" ")[2], random.choice(_WORDS))
        else:
            lines[at] = random.choice(_WORDS) + " " + random.choice(_WORDS)
        lines = lines or [""]
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(3))
def test_c06_a_listing_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    """Whatever it says: an error of ours, or a model with its problems."""
    random, kinds, accepted = Random(seed), set(), 0
    path = tmp_path / "f"
    for number in range(700):
        shapes = list_shapes(random.choice(TABLES), **random.choice([{}, {"moe": None}]))
        lines = [f"{name} {str(list(s)).replace(' ', '')}" for name, s in shapes.items()]
        text = _mutate(lines, random)
        if random.random() < 0.3:
            values = dict(line.split(" ", 1) for line in lines if " " in line)
            text = json.dumps(values).replace('"[', "[").replace(']"', "]")
            at = random.randrange(len(text))
            text = text[:at] + random.choice(_WORDS) + text[at + random.randrange(4) :]
        path.write_bytes(text.encode())
        try:
            summarize(str(path))
            accepted += 1
        except CheckpointError as error:
            kinds.add("".join(c for c in str(error) if c.isalpha())[-25:])
        except Exception as error:
            error.add_note(f"seed {seed}, listing {number}: {text[:600]!r}")
            raise
    assert accepted > 100
    assert len(kinds) > 20, kinds
