"""What priors and merges share: parts of cards and manifests, and `verify`.

Must not know how an output was made, only what its manifest says.

Read: card, describe, nearness, checks, verify.
"""
