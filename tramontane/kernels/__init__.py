"""Functions of tensors, without modules or configuration: the specification and its fast equals.

`reference` is the plain version that is obviously right; the others equal it within the bounds of
`docs/numerics.md`; `dispatch` picks one.
"""
