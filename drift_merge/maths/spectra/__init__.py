"""Singular directions of one matrix: the leading ones, all of them, and what they weigh.

It promises equal bytes for equal matrices and keys, however many threads run around it. It must
not know models, files, or how a matrix is stored. Read: matrices, bands,
leading, norms, steps.
"""
