"""Prints the model card of a finished run, from its own files.

python recipes/write_card.py RUN [DENSE_RUN], each with model/ (training.json in it tells how it was
trained), config.json, and scores.json (`tramontane perplexity --json`). RUN is the mixture of
experts, DENSE_RUN its dense equal.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from textwrap import fill
from typing import Any

from tramontane import LLM, SamplingParams
from tramontane.config import ModelConfig
from tramontane.data.sources import parse_source

PROMPTS = (
    "Once upon a time",
    "Lily found a small box under the tree. She opened it and",
    "Tom was sad because his kite was broken. His sister said,",
)
LICENCES = {
    "tinystories": "CDLA-Sharing-1.0", "tinystories_truecased": "CDLA-Sharing-1.0",
    "storybooks": "CC-BY", "childrens_books_en": "public domain", "gutenberg_en": "public domain",
    "gutenberg_fr": "public domain", "gutenberg_de": "public domain",
    "gutenberg_it": "public domain", "gutenberg_es": "public domain",
    "wikipedia_en": "CC-BY-SA-3.0", "stackexchange_en": "MIT",
    "arxiv_latex": "CC-BY-4.0, CC-BY-SA-3.0, MIT", "pubmed_en": "CC-BY",
    "philosophy_en": "public domain, CC-BY-4.0", "textbooks_en": "CC-BY-4.0",
    "code_python": "MIT, BSD-3-Clause, Apache-2.0", "techdocs": "CC-BY-4.0",
    "math_dm": "generated",
}  # fmt: skip


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python recipes/write_card.py RUN [DENSE_RUN]")
    run = Path(sys.argv[1])
    dense = Path(sys.argv[2]) if len(sys.argv) == 3 else None
    for part in (describe(run, dense), list_scores(run, dense), list_load(run), list_samples(run)):
        print(part)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_config(run: Path) -> ModelConfig:
    return ModelConfig.from_dict(read_json(run / "config.json")["model"])


def read_stages(run: Path) -> list[dict[str, Any]]:
    """The runs that made the model, the first one from random weights."""
    stages: list[dict[str, Any]] = read_json(run / "model" / "training.json")["stages"]
    return stages


def count_tokens(run: Path) -> int:
    return sum(stage["tokens"] for stage in read_stages(run))


def describe_stage(stage: dict[str, Any]) -> str:
    if "upcycled" in stage:
        return f"upcycled to {stage['upcycled']['num_experts']} experts"
    optimizer = stage["optimizer"]
    dropout = f", dropout {stage['dropout']:g}" if stage.get("dropout") else ""
    share = stage.get("average_start", 0)
    mean = f", and the mean with the model before it, which counts {share:.0%}" if share else ""
    return (
        f"{stage['steps']:,} steps of {stage['tokens_per_step']:,} tokens with "
        f"{optimizer['kind']} at {optimizer['lr']:g} ({optimizer['schedule']}) in {stage['dtype']}"
        f"{dropout}{mean}"
    )


def describe(run: Path, dense: Path | None) -> str:
    config, stages = read_config(run), read_stages(run)
    count = config.count_parameters()
    assert config.moe is not None
    head = (
        "---\nlicense: other\nlanguage: [en, fr, de, it, es]\npipeline_tag: text-generation\n---\n"
        "# The bundled model of tramontane\n"
    )
    text = f"""
A Mixtral of {config.moe.num_experts} experts, of which each token uses
{config.moe.num_experts_per_tok}: {count.total:,} parameters, {count.active:,} active per token.
{config.n_layers} layers, dim {config.dim}, hidden {config.hidden_dim}, {config.n_heads} heads over
{config.n_kv_heads}, vocabulary {config.vocab_size:,}, context {config.max_seq_len:,} tokens. It
writes simple English stories, and knows a little of 17 other domains, so that routing can be
studied. It is no source of facts, has not been aligned, and repeats what old books say of people.

Trained from random weights by `recipes/pretrain.sh` on {count_tokens(run):,} tokens (texts of the
small domains several times): {"; then ".join(map(describe_stage, stages))}. Master weights in
fp32, load-balancing loss {stages[-1]["load_balancing_coef"]:g}. {describe_baseline(dense)}

The file is an ordinary Hugging Face folder: `AutoModelForCausalLM.from_pretrained` reads it."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
    return head + "\n" + "\n\n".join(fill(p, width=100) for p in paragraphs) + "\n"


def describe_baseline(dense: Path | None) -> str:
    """What the last column of the scores is."""
    if dense is None:
        return "No dense baseline has been trained on these tokens yet."
    count = read_config(dense).count_parameters()
    stages = "; then ".join(map(describe_stage, read_stages(dense)))
    return (
        f"The dense baseline has {count.active:,} parameters, all active, and saw "
        f"{count_tokens(dense):,} tokens of the same mixture: {stages}."
    )


def list_scores(run: Path, dense: Path | None) -> str:
    """One row per domain: share of the tokens, licence, held-out bits per byte of both models."""
    ours = read_json(run / "scores.json")
    theirs = read_json(dense / "scores.json") if dense else None
    shares = count_shares(read_stages(run))
    lines = [
        "## Data, licences, held-out bits per byte (lower is better)",
        "",
        "Whole documents of the `valid` split, in fp32, pieces of the context length.",
        "",
        "| domain | licence | share of tokens | this model | dense baseline |",
        "|---|---|--:|--:|--:|",
    ]
    for domain, score in ours["domains"].items():
        baseline = f"{theirs['domains'][domain]['bits_per_byte']:.3f}" if theirs else "-"
        lines.append(
            f"| {domain} | {LICENCES.get(domain, 'see the data')} | {shares[domain]:.1%} | "
            f"{score['bits_per_byte']:.3f} | {baseline} |"
        )
    mean = f"**{theirs['mean']:.3f}**" if theirs else "-"
    lines.append(f"| **mean of domains** | | | **{ours['mean']:.3f}** | {mean} |")
    return "\n".join(lines) + "\n"


def count_shares(stages: list[dict[str, Any]]) -> dict[str, float]:
    """Of all tokens, over the stages; each mixes its sources by their weights."""
    total, shares = sum(stage.get("tokens", 0) for stage in stages), defaultdict[str, float](float)
    for stage in stages:
        sources = [parse_source(spec) for spec in stage.get("sources", ())]
        weights = sum(source.weight for source in sources)
        for source in sources:
            shares[source.domain] += source.weight / weights * stage["tokens"] / total
    return shares


def list_load(run: Path) -> str:
    """Share of the assignments per layer and expert, over all held-out text."""
    domains = read_json(run / "scores.json")["domains"].values()
    lines = [
        "## Router balance",
        "",
        "Share of assignments per expert on held-out text, mean of domains; 12.5 % is balanced.",
        "",
    ]
    num_layers = len(next(iter(domains))["layers"])
    for layer in range(num_layers):
        rows = [domain["layers"][layer]["shares"] for domain in domains]
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        shown = " ".join(f"{100 * mean:5.1f}" for mean in means)
        lines.append(f"    layer {layer}  {shown}  %")
    return "\n".join(lines) + "\n"


def list_samples(run: Path) -> str:
    """The first answer to each prompt, as it came."""
    llm = LLM(run / "model")
    params = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=160, seed=1)
    lines = [
        "## Samples",
        "",
        "Unedited: the first answer each, at temperature 0.7, top-p 0.95, seed 1.",
    ]
    for prompt in PROMPTS:
        answer = llm.generate(prompt, params).text
        quoted = f"**{prompt}**{answer}".replace("\n", "\n> ")
        lines += ["", f"> {quoted}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
