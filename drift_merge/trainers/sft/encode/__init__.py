"""From conversations to batches with labels, by the model's own processor and chat template.

Must not know files. Read: places, spans, processor, collator, check.
"""
