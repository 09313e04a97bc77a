"""Weights on disk, in any layout: recognised from their content, read in place, written, never run.

`intake.open_checkpoint` says what lies at a path; `loader.load_model` makes a model of it;
`writer.py` and `gguf_writer.py` write one. Another layout is another table in `names.py`, a module
like `mistral.py`, and a place in `intake.LAYOUTS`. `files/` knows the formats of single files.
"""
