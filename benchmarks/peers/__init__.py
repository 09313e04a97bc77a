"""Programs that run the same models, behind one interface: `generate(prompts, num_tokens)`."""
