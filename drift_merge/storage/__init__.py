"""Floor 1: bytes. Sources, checkpoints, shards, the journal. Knows no model and no method."""
