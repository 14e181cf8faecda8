"""Matches a prior's tensors to the parameters of a live model, and accounts for both without a gap.

Must not know gradients or rules: only names, shapes and, in `samples` and `weights`, values of
parameters.

Read: coverage, live, boxes, conversions, samples, lines, tower, pairs, account, matching, weights,
verdicts.
"""
