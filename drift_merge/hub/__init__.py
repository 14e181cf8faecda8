"""Publishes artifacts on the Hugging Face Hub and pulls them: whole, and every hash compared.

Must not know how an artifact was made, only what its manifest names.

Read: licenses, files, signing, refusals, repository, push, progress, pull, cache, publish.
"""
