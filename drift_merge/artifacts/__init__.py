"""What priors and merges share: parts of cards and manifests, checks of a finished output.

Must not know which of the two it serves, nor how an output was made.

Read: card, describe, checks.
"""
