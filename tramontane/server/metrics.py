"""Prometheus metrics: vLLM's names, suffixes, buckets and labels, with our own prefix.

What the engine counts is read when it is asked for; what requests measure is kept here. Each
application has a registry of its own.
"""

import math
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from tramontane.engine.completion import Completion
from tramontane.engine.sampling_params import SamplingParams
from tramontane.server.ports import EngineStats, ServingEngine

PREFIX = "tramontane:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("model_name", "engine")
# vLLM's buckets (vllm/v1/metrics/loggers.py), in seconds.
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
                7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
            10.0, 20.0, 40.0, 80.0)  # fmt: skip
_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
            120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_CHOICES = (1, 2, 5, 10, 20)
_PASS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", _BETWEEN),
    "request_time_per_output_token_seconds": ("Mean of the above per answer.", _BETWEEN),
    "e2e_request_latency_seconds": ("From arrival to the end.", _REQUEST),
    "request_queue_time_seconds": ("Waiting to be run.", _REQUEST),
    "request_prefill_time_seconds": ("From the queue to the first token.", _REQUEST),
    "request_decode_time_seconds": ("From the first token to the last.", _REQUEST),
    "request_inference_time_seconds": ("Prefill and decode.", _REQUEST),
    "request_prompt_tokens": ("Tokens of prompts.", _TOKENS),
    "request_generation_tokens": ("Tokens of answers.", _TOKENS),
    "request_params_max_tokens": ("max_tokens of requests.", _TOKENS),
    "request_params_n": ("n of requests.", _CHOICES),
}


class ServerMetrics:
    """What `/metrics` shows."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(
                PREFIX + name, text, _LABELS, registry=self._registry, buckets=buckets
            )
            for name, (text, buckets) in _HISTOGRAMS.items()
        }  # fmt: skip
        self._success = Counter(
            PREFIX + "request_success", "Answers by the reason of their end.",
            (*_LABELS, "finished_reason"), registry=self._registry,
        )  # fmt: skip
        self._labels = ("", "0")
        self._children: dict[str, Histogram] = {}

    def watch_engine(self, engine: ServingEngine, *, model_name: str) -> None:
        """The model is there: show its counts, and label all with its name."""
        self._labels = (model_name, "0")
        self._children = {
            name: histogram.labels(*self._labels) for name, histogram in self._histograms.items()
        }
        self._registry.register(_EngineCollector(engine, self._labels))

    def observe(self, name: str, value: float) -> None:
        """Add to a histogram."""
        self._children[name].observe(value)

    def note_request(self, params: SamplingParams) -> None:
        """A request was accepted."""
        self.observe("request_params_max_tokens", params.max_tokens)
        self.observe("request_params_n", params.n)

    def note_completion(self, completion: Completion, *, seconds: float) -> None:
        """An answer has ended, `seconds` after its request came."""
        self._success.labels(*self._labels, completion.finish_reason).inc()
        timings, num_tokens = completion.timings, completion.num_completion_tokens
        prefill = max(0.0, timings.time_to_first_token - timings.queue_seconds)
        self.observe("e2e_request_latency_seconds", seconds)
        self.observe("request_queue_time_seconds", timings.queue_seconds)
        self.observe("request_prefill_time_seconds", prefill)
        self.observe("request_decode_time_seconds", timings.decode_seconds)
        self.observe("request_inference_time_seconds", prefill + timings.decode_seconds)
        self.observe("request_prompt_tokens", completion.num_prompt_tokens)
        self.observe("request_generation_tokens", num_tokens)
        if num_tokens > 1:
            mean = timings.decode_seconds / (num_tokens - 1)
            self.observe("request_time_per_output_token_seconds", mean)

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's own counts at each scrape."""

    def __init__(self, engine: ServingEngine, labels: tuple[str, str]) -> None:
        self._engine, self._labels = engine, labels

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not call the engine when this is added."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.get_stats()
        gauges = {
            "num_requests_running": ("Requests that run.", stats.num_running),
            "num_requests_waiting": ("Requests that wait.", stats.num_waiting),
            "kv_cache_usage_perc": ("Share of the blocks in use, 0 to 1.", stats.kv_cache_usage),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts.", stats.num_prompt_tokens),
            "generation_tokens": ("Tokens of answers.", stats.num_generation_tokens),
            "prefix_cache_queries": ("Tokens looked up.", stats.prefix_cache_queries),
            "prefix_cache_hits": ("Tokens found.", stats.prefix_cache_hits),
            "num_preemptions": ("Requests set back for want of room.", stats.num_preemptions),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        yield self._describe_passes(stats.pass_sizes)
        yield self._describe_cache()
        yield from self._collect_experts(stats)

    def _describe_passes(self, sizes: Mapping[int, int]) -> Metric:
        passes = HistogramMetricFamily(
            PREFIX + "iteration_tokens_total", "Tokens of a pass.", labels=_LABELS
        )
        buckets = [
            (floatToGoString(most), sum(n for size, n in sizes.items() if size <= most))
            for most in (*_PASS, math.inf)
        ]
        num_tokens = sum(size * n for size, n in sizes.items())
        passes.add_metric(self._labels, buckets, num_tokens)
        return passes

    def _describe_cache(self) -> Metric:
        """What is known of the cache, as labels of the number 1."""
        config = self._engine.cache_config
        info = GaugeMetricFamily(
            PREFIX + "cache_config_info", "The cache of keys and values.",
            labels=(*_LABELS, *config),
        )  # fmt: skip
        info.add_metric((*self._labels, *map(str, config.values())), 1)
        return info

    def _collect_experts(self, stats: EngineStats) -> Iterator[Metric]:
        if not stats.expert_tokens:
            return
        tokens = CounterMetricFamily(
            PREFIX + "expert_tokens", "Tokens that ran through an expert.",
            labels=(*_LABELS, "layer", "expert"),
        )  # fmt: skip
        imbalance = GaugeMetricFamily(
            PREFIX + "expert_load_imbalance", "Load of a layer's busiest expert; 1 is the mean.",
            labels=(*_LABELS, "layer"),
        )  # fmt: skip
        for layer, counts in enumerate(stats.expert_tokens):
            for expert, count in enumerate(counts):
                tokens.add_metric((*self._labels, str(layer), str(expert)), count)
            if total := sum(counts):
                share = max(counts) * len(counts) / total
                imbalance.add_metric((*self._labels, str(layer)), share)
        yield tokens
        yield imbalance
