"""The commands that make something else of priors: an adapter, or another prior.

They promise to change no input. They must not know formulas. Read: extract_lora,
combine.
"""
