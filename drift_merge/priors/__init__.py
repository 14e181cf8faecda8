"""Floor 3: the reasoning prior as an artifact. Compute, describe, open, verify."""
