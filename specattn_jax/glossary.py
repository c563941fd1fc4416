"""Axis letters and words of quantities: they mean the same thing in every signature and comment.

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

One word stands for one quantity; `docs/glossary.md` has more of them.

=============  ====================================================================
word           meaning
=============  ====================================================================
kv_reduction   share of the target's cache reads saved, averaged over layers, kv
               heads and windows
read share     share of the entries of a cache that are read
draft_reads    the read share of the draft's own cache
p              attention mass that a selection keeps of the predicted attention
left_out       1 - p, in budgets, where it is scaled
captured mass  the target's own attention mass that lay in what was read
plan           what one target layer reads in one window (`SelectionPlan`)
choice         a mode and a window, as the gate chooses them
=============  ====================================================================
"""
