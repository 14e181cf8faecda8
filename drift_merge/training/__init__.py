"""Biases the gradients of a model under training with a prior, once per optimizer step by default.

Must not know any trainer: it sees a model, an optimizer and a prior, wherever they come from.

Read: options, units, schedules, settings, lora, gradients, deltas, match, inject, placing,
gradient_bias, report, strength, guard, handle, attach.
"""
