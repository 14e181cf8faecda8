"""The k largest entries of a stream, exactly, without sorting it or holding it in memory.

Must not know what the entries mean; merge methods decide which k and what becomes of the rest.

Read: collected, cuts, thresholds, ranks.
"""
