"""What the user is told beside a difference: what it means, and what to choose or to paste.

Must not know towers or how tensors are paired: only configs, names and shapes of leftovers.

Read: rotary, offers.
"""
