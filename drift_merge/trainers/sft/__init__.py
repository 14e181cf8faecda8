"""Fine-tuning with a prior for people without a trainer: transformers' Trainer.

Must not know how gradients are biased: a DriftCallback does that, as for anybody else.

Read: data, encode, trained, curves, request, memory, disk, ranks, model, publish, watch, run.
"""
