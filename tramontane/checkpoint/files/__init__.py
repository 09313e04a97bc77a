"""Files that hold tensors, whatever they are called there: safetensors, GGUF, torch archives.

Headers are read in full and checked before any of it is believed; values are mapped, not read.
"""
