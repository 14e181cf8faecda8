"""Writes the tensors of priors that are combined, compressed or of low rank, and measures them.

Must not know how delta was computed, or whose it is.

Read: combining, compressing, factoring.
"""
