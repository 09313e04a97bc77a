"""The requests of `load_client.py` through the Python interface: what a server adds to them.

    python benchmarks/offline_client.py FOLDER QUANT STREAMS REQUESTS MAX_TOKENS ROUND

Prints the same JSON object, without times of single tokens. At most STREAMS answers are under way.
"""

import json
import sys
import time
from dataclasses import asdict

from load_client import Result, list_prompts

from tramontane import LLM, SamplingParams


def run_offline(
    folder: str, quant: str, streams: int, requests: int, max_tokens: int, round_number: int
) -> Result:
    llm = LLM(folder, quant=quant or None, max_num_seqs=streams)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    llm.generate("warm", params)
    started = time.perf_counter()
    prompts = list_prompts(requests, round_number)
    answers = llm.generate(prompts, params, show_progress=False)
    seconds = time.perf_counter() - started
    return Result(num_tokens=sum(len(answer.token_ids) for answer in answers), seconds=seconds)


if __name__ == "__main__":
    folder, quant, *numbers = sys.argv[1:]
    print(json.dumps(asdict(run_offline(folder, quant, *map(int, numbers)))))
