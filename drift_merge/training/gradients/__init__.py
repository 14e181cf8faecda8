"""Where the local gradients of each layout lie: plain, DDP, FSDP2, tensor parallel, ZeRO-0 to 3.

Must not know deltas, rules or alpha: it gives a gradient, takes it back, and names the ranks.

Read: layout, zero_partitions, deepspeed, sharded, hooks, choose, microbatch,
takers, rounding, optimizer_state.
"""
