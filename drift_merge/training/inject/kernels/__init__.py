"""The two passes over gradients and deltas for many tensors at once: sums, and g -= c * delta.

Must not know rules, layouts or priors: a run is a piece of memory with a gradient and one with its
delta. What no kernel takes, the loop of `inject.pieces` does.

Read: runs, source, native, triton_kernels, choose.
"""
