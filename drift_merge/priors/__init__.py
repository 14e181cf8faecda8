"""The prior as an artifact: computes, describes, opens, compresses and verifies deltas.

Must not know merges, the Hub's side of publishing, or training.

Read: manifest, summary, card, deltas, spectra, compute, compress, verify, combine.
"""
