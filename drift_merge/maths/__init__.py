"""Tensor formulas: pure functions of chunks, which give the same numbers wherever they run.

Must not know files, names of tensors, or how a tensor was cut into chunks by others.

Read: dtypes, masks, spectra, lowrank, chunks, measures, differences, compression, injection, order,
methods, rounding.
"""
