"""Says what a layer is made of: the class of each tensor, and what the leftovers of two towers are.

Must not know how a tower is found or how its tensors are stored: only names within it and shapes.

Read: structure, leftovers, promises.
"""
