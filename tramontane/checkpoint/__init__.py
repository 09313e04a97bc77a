"""Weights on disk: read and written as safetensors, never as pickles, never half.

`loader.load_model` reads any layout that `intake.py` knows; `writer.save_model` writes a Hugging
Face folder. Another layout is another module like `hf.py` and one line in `intake.LAYOUTS`.
"""
