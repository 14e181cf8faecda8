"""Writes the tensors of priors that are compressed or of low rank, and measures what they keep.

Must not know how delta was computed, or whose it is.

Read: compressing, factoring.
"""
