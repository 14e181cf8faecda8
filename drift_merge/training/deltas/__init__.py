"""The values of delta where and when they are needed: from files, on the device, or anew.

Must not know gradients or rules: whoever asks says which block of which unit.

Read: controls, opened, files, factored, packed, held, queues, streamed, gathered, placement,
refresh, beginning.
"""
