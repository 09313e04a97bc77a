"""The cost meter, against the formulae worked out by hand, and the metrics of the same requests."""

from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fake_engine import FakeEngine
from tests.server.live import run_live
from tramontane.engine.completion import Completion, Timings
from tramontane.server.usage import CostMeter, count_active, count_expert_bytes, count_flops

# Mixtral 8x7B at 4 bits per weight of an expert.
MIXTRAL = SimpleNamespace(
    n_layers=32, dim=4096, num_experts_per_tok=2, layer_experts=(8,) * 32,
    num_active_parameters=12_879_925_248, num_expert_parameters=176_160_768,
    weight_bytes_per_expert=88_080_384,
)  # fmt: skip


def make_completion(num_prompt: int, num_answer: int, **changes) -> Completion:
    values = {
        "text": "", "token_ids": (5,) * num_answer, "finish_reason": "length",
        "num_prompt_tokens": num_prompt, "timings": Timings(0.1, 0.2), **changes,
    }  # fmt: skip
    return Completion(**values)


def test_more_experts_are_more_active_parameters():
    """With all eight experts every parameter works: the published total of Mixtral 8x7B."""
    model = SimpleNamespace(**{**vars(MIXTRAL), "num_expert_parameters": 176_160_768})
    per_layer = model.num_expert_parameters
    assert count_active(model, None) == count_active(model, 2) == 12_879_925_248
    assert count_active(model, 8) == 12_879_925_248 + 6 * 32 * per_layer == 46_702_792_704
    assert count_active(model, 1) == 12_879_925_248 - 32 * per_layer


def test_a_dense_layer_reads_its_only_network():
    """A pyramid of which one layer is dense: 4 experts, and 1."""
    model = SimpleNamespace(**{**vars(MIXTRAL), "layer_experts": (4, 1)})
    assert count_active(model, 3) == count_active(model, 2) + model.num_expert_parameters
    read = count_expert_bytes(model, make_completion(2, 5), 0, 6)
    assert read / model.weight_bytes_per_expert == (4 * (1 - 0.5**2) + 4 * 2) + (1 + 4 * 1)


def test_flops_of_a_token_by_token_sum():
    for start, end in ((0, 7), (3, 20), (5, 5)):
        expected = sum(2 * 1000 + 4 * 32 * 4096 * (at + 1) for at in range(start, end))
        assert count_flops(MIXTRAL, 1000, start, end) == expected


@pytest.mark.parametrize(("tokens", "distinct"), [(1, 2.0), (2, 3.5), (4, 5.47), (8, 7.20)])
def test_a_prompt_reads_the_experts_that_the_batch_formula_expects(tokens, distinct):
    """S-36: 8 (1 - (3/4)^B) distinct experts per layer."""
    completion = make_completion(tokens, 0)
    read = count_expert_bytes(MIXTRAL, completion, 0, tokens)
    assert read / MIXTRAL.weight_bytes_per_expert / 32 == pytest.approx(distinct, abs=0.005)


def test_known_routing_is_counted():
    model = SimpleNamespace(num_experts_per_tok=2, weight_bytes_per_expert=10)
    prompt = [[[0, 1], [2, 3]], [[0, 1], [2, 0]]]  # 2 tokens, 2 layers: 2 and 3 distinct
    answer = [[[3, -1], [1, 2]]]  # one token that ran: 1 and 2
    routed = np.array(prompt + answer, np.int16)
    completion = make_completion(2, 2, selected_experts=routed)
    assert count_expert_bytes(model, completion, 0, 3) == (2 + 3 + 1 + 2) * 10


def test_a_dense_model_reads_no_expert():
    model = SimpleNamespace(num_experts=None, num_experts_per_tok=None)
    assert count_expert_bytes(model, make_completion(3, 3), 0, 5) == 0


def test_cached_tokens_did_not_run():
    whole = CostMeter(MIXTRAL).build_usage([make_completion(100, 5)])
    cached = CostMeter(MIXTRAL).build_usage([make_completion(100, 5, num_cached_tokens=96)])
    assert cached["prompt_tokens_details"]["cached_tokens"] == cached["cost"]["cached_tokens"] == 96
    num_ran = 4 + 5 - 1
    assert cached["cost"]["flops"] == count_flops(MIXTRAL, 12_879_925_248, 96, 96 + num_ran)
    assert cached["cost"]["flops"] < whole["cost"]["flops"] / 10


def test_answers_of_one_prompt_ran_it_once():
    choices = [make_completion(100, 5, index=i) for i in range(3)]
    usage = CostMeter(MIXTRAL).build_usage(choices)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (100, 15)
    active = 12_879_925_248
    assert usage["cost"]["flops"] == count_flops(MIXTRAL, active, 0, 104) + 2 * count_flops(
        MIXTRAL, active, 100, 104
    )


def test_the_price_follows_the_load():
    """S-36: $ per million tokens = ($/h) / (3600 tokens/s) * 10^6."""
    now = [100.0]
    meter = CostMeter(MIXTRAL, price_per_hour=3.6, clock=lambda: now[0])
    for _ in range(100):
        meter.note_tokens(50)
        now[0] += 1
    cost = meter.build_usage([make_completion(1, 1)])["cost"]
    assert cost["usd_per_million_tokens"] == pytest.approx(3.6 / (3600 * 50) * 1e6, rel=0.02)
    now[0] += 1000
    assert "usd_per_million_tokens" not in meter.build_usage([make_completion(1, 1)])["cost"]
    free = CostMeter(MIXTRAL).build_usage([make_completion(1, 1)])
    assert "usd_per_million_tokens" not in free["cost"]


def test_usage_names_the_price_when_the_operator_does():
    with run_live(lambda: FakeEngine(seconds_per_token=0.005), price_per_hour=2.0) as live:
        assert live.chat().json()["usage"]["cost"]["usd_per_million_tokens"] > 0


def read_metrics(live) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = live.client.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_have_vllms_names():
    with run_live() as live:
        live.chat(max_tokens=8, n=2)
        live.chat(max_tokens=3, stream=True)
        metrics = read_metrics(live)
        labels = (("engine", "0"), ("model_name", "fake"))
        names = {name.removeprefix("tramontane:") for name, _ in metrics}
        for name in (
            "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
            "prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total",
            "prefix_cache_hits_total", "num_preemptions_total", "request_success_total",
            "cache_config_info", "expert_tokens_total", "expert_load_imbalance",
        ):  # fmt: skip
            assert name in names, name
        for name in (
            "time_to_first_token_seconds", "inter_token_latency_seconds",
            "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
            "request_queue_time_seconds", "request_prefill_time_seconds",
            "request_decode_time_seconds", "request_inference_time_seconds",
            "request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens",
            "request_params_n", "iteration_tokens_total",
        ):  # fmt: skip
            assert {name + end for end in ("_bucket", "_count", "_sum")} <= names, name
        assert metrics["tramontane:prompt_tokens_total", labels] == 12
        finished = (*labels[:1], ("finished_reason", "length"), *labels[1:])
        assert metrics["tramontane:request_success_total", finished] == 3
        assert metrics["tramontane:time_to_first_token_seconds_count", labels] == 3
        assert metrics["tramontane:inter_token_latency_seconds_count", labels] == 7 + 7 + 2
        assert metrics["tramontane:request_generation_tokens_sum", labels] == 8 + 8 + 3
        passes = {
            dict(key)["le"]: value
            for (name, key), value in metrics.items()
            if name == "tramontane:iteration_tokens_total_bucket"
        }
        assert [passes[most] for most in ("1.0", "8.0", "16.0", "16384.0", "+Inf")] == [
            5, 5, 7, 7, 8,
        ]  # fmt: skip
        assert metrics["tramontane:iteration_tokens_total_sum", labels] == 5 + 2 * 9 + 20_000
        cache = (("block_size", "16"), *labels, ("sliding_window", "None"))
        assert metrics["tramontane:cache_config_info", cache] == 1
        layer_1 = (("engine", "0"), ("layer", "1"), ("model_name", "fake"))
        assert metrics["tramontane:expert_load_imbalance", layer_1] == 4


def test_metrics_of_two_applications_do_not_meet(server):
    with run_live() as live:
        before = read_metrics(server)
        live.chat()
        assert read_metrics(server) == before
