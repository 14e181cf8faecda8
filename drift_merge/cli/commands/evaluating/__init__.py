"""The commands that ask how good a merge is.

They promise what the other commands promise. They must not know how a merge is made. Read: check,
search, evaluate.
"""
