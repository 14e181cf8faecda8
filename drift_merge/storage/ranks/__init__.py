"""Processes that torchrun has started on one command: they meet, wait for each other, fail as one.

Must not know what they work on: tensors are summed, plain values exchanged. Alone, all of it does
nothing.

Read: environment, failures, watch, meeting.
"""
