"""Fine-tuning with a prior for people without a trainer: transformers' Trainer, one process.

Must not know how gradients are biased: a DriftCallback does that, as for anybody else.

Read: examples, curves, request, disk, run.
"""
