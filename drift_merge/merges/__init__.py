"""Floor 3: the merged checkpoint as an artifact. Make, describe, verify."""
