"""Floor 3: push artifacts to the Hugging Face Hub, and pull them, whole and checked."""
