"""Thin adapters that attach a prior inside other people's trainers, a few lines each.

Must not know rules or layouts: everything that matters is `attach` and its handle.

Read: wiring, hf, lightning, axolotl, swift, llamafactory, verl, torchtitan, sft, extraction.
"""
