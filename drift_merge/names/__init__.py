"""Strings and shapes: which stored tensor of one model is which of the other; all are counted.

Must not know tensor data or files of weights: everything follows from names, shapes and configs.

Read: tensors, name_map, layouts, modules, layers, tables, advice, lineage, naming, towers, fusions,
pairing, vocabulary, tokens, embeddings, second_names, account, refusals, align.
"""
