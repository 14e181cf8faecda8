"""Shards on loan from the Hub: fetched ahead of use, deleted after it, within a limit.

Must not know why a shard is needed: the plan of leases is made elsewhere and only followed here.

Read: leases, fetchers, cache.
"""
