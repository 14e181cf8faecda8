"""What stands on the disk for a delta that is not stored as it is: codes and scales, or factors.

Must not know arithmetic: names, dtypes and shapes only.

Read: factored, compressed.
"""
