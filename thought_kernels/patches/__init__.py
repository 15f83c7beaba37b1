"""A patch is data: a matrix and a vector per block and site. What is done with one has a file each.

site            one block's and site's part
data            PatchData: all parts, checked, with their provenance
patch           ThoughtPatch: the data with its arithmetic, and a door to each of the verbs below
summary         what a patch prints
apply, merge    a patch in a model: by hooks, or in the weights
vectors         the vectors' place among the biases
storage         a patch as a folder
card, hub       its model card; the folder as a repository
identity        which model it was made for
exports         a patch for other programs: PEFT, transformers, llama.cpp; a file for each format
"""
