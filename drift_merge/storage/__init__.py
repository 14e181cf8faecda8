"""Bytes: finds checkpoints, reads headers and data, writes shards that are whole or absent.

Must not know what a tensor means: no model, no method, no plan; names and dtypes are text here.

Read: folder, headers, listed, weight_map, sizes, processes, ranks, shards, sources, measured,
forms, hub, checkpoint, quantized, adapters, fingerprints, copying, manifests, loans, mapped,
journal, outputs, output.
"""
