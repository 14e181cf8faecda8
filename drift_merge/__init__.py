"""drift_merge: move the reasoning of a text LLM into a multimodal LLM."""
