"""Rows to sums, sums to matrices.

accumulator   the streaming sums over tokens
sums          those of one block and site
state         all of them as a state_dict
rows          checks what it is given
kept_rows     the rows themselves, where there are fewer of them than dimensions
estimators    sums to a thought matrix and vector
"""
