"""Floor 5: `drift-prior` and `drift-merge`. Parse, call, print; no rules of their own."""
