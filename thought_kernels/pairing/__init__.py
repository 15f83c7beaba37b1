"""Rows from a model: activations with and without the prompt, block by block.

pairings      two_pass, layerwise; all three by name
sequential    the default: each block solved before the next is run
run           what a pairing is given
streams       the two residual streams
batches       examples of one length class over their cached prefixes
before_norm   a difference taken back through the norm that follows a site
spill         tensors that wait in a temporary file
replay        the exactness theorem on real weights
"""
