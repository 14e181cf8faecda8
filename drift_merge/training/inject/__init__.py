"""Subtracts alpha * coefficient * delta from gradients: sums, one all-reduce, coefficients, update.

Must not know how gradients are stored or where deltas lie: layouts and sources give both.

Read: kernels, uses, scratch, pieces, scatter, adapted, injector, build.
"""
