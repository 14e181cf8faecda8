"""The place of an output: what may be replaced there, where its unfinished state is, who writes.

Must not know what is written there.

Read: filesystems, lock, existing.
"""
