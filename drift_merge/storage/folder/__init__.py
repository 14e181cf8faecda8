"""The folder of a checkpoint: which of its files is what, and how files are opened.

Promises that every file below a checkpoint is accounted for: weights, a second copy of them, a
state of training, or carried over. Must not know what a tensor is. Read: limits, faults, contents,
scan, notes.
"""
