"""Methods on the singular directions of task vectors, matrix by matrix.

It promises memory for some matrices of one tensor, never for a model, and bytes that depend on
neither chunks nor threads. It must not know files or names. Read: by_matrix,
leading, sums, subspaces, gram, calibration, entries.
"""
