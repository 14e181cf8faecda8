"""Executes plans in bounded memory, at the speed of a copy, with the same bytes however it is run.

Must not know formulas, the files beside the shards, or the command line.

Read: ranks, workspace, pieces, inputs, strangers, downloads, context, reader, nonfinite,
whole_model, storing, settings, steps, workers, reread, flushing, stream, job.
"""
