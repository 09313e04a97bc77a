"""Weights of few bits: formats, fitting, and the modules that run them in place of the plain ones.

`formats.py` says what a format is and which parts of a model have one, `fitting.py` rounds a matrix
into it, `modules.py` runs it, `apply.py` swaps the modules of a model. The layout of the bytes is
`kernels/packing.py`; `docs/quantization.md` shows all of it with numbers.
"""
