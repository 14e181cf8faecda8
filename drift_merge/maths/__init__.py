"""Floor 0: pure tensor formulas. No files, no names."""
