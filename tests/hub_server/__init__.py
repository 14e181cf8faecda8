"""A Hugging Face Hub on the loopback interface: store, repo, writes, server, client, models."""
