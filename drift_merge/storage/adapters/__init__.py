"""PEFT's adapter directories: what their fields mean and which factors they store.

Promise: a field whose effect is not computed here exactly is refused by its name.
It must not know: the base, its names, the engine.
Read: refusals, fields, selection, factors.
"""
