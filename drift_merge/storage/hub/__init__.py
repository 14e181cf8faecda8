"""The Hugging Face Hub, read only: pinned revisions, headers alone, files checked by hash.

Must not know when a shard is needed or how long it may stay; nothing is ever sent from here.

Read: faults, ranges, models, adapters, artifacts, shards.
"""
