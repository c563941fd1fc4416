"""Axis glossary. These letters mean the same thing in every signature and comment.

======  ==========================================================================
letter  meaning
======  ==========================================================================
B       sequences in the batch
T       query tokens of one call (W + 1 when verifying)
W       tokens drafted per window (the paper's gamma)
S       slots of the KV cache
L       target layers
M       draft layers
N       query heads
K       kv heads
G       query heads per kv head, N / K
H       width of one head
D       width of the residual stream (embedding)
F       width of the gated MLP
V       vocabulary, padding included
R       attention sources of the draft that an alignment mixes
P       selected blocks, at most
======  ==========================================================================
"""
