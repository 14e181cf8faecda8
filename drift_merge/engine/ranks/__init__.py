"""Divides the work of a plan among ranks, and folds what they measured, in the plan's order.

Must not know how ranks meet (`storage/ranks`), nor formulas. No byte of an output depends on it.

Read: division, folding.
"""
