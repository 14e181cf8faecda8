"""Evaluation: a model in, numbers out, by programs that this package does not contain.

It promises that both ends of a comparison are evaluated alike, and that a difference comes with
what chance alone would give. It must not know how a merge was made. Read: scores, intervals,
command, health, probe, check, unmerged, kits, ends.
"""
