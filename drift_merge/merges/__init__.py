"""The merge as an artifact: a complete MLLM checkpoint with sidecars, manifest and card.

Must not know formulas (a method is a name here) or anything of priors but their manifest.

Read: manifest, card, sidecars, make, apply, verify, evaluations.
"""
