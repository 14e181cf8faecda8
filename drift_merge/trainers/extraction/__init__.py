"""A prior as a PEFT adapter for its MLLM: reasoning that is switched on and off when serving.

Promises that the adapter adds the leading directions of delta and nothing else, and that what no
adapter can hold is named and counted. Must not know gradients or rules.

Read: memory, factors, adapter, extract.
"""
