"""Floor 2: recipe, plan, stream, verify. The plan is plain data; the executor is one loop."""
