"""The parts of a decoder layer: modules that hold weights and call kernels.

Shapes throughout: T tokens (of all sequences, one after another), D dim, F hidden_dim, E experts,
K experts per token, H heads, G kv heads, S head_dim.
"""
