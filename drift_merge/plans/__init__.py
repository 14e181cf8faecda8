"""What will happen, as plain data from headers: each output tensor, its inputs, its place.

Must not know tensor data or torch: a plan is printed by --dry-run and executed by the engine.

Read: projections, plan, gates, views, folders, prior, merge, vocabularies, copies, prepare,
arrange, transfers.
"""
