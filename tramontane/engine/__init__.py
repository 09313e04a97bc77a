"""Generation: requests (`sequence`), the cache, the sampler, and the loop that joins them.

`llm.LLM` is the way in. `sampling_params`, `generation_config`, `text_output`, `sequence`,
`pulse` and `bundled` need no torch.
"""
