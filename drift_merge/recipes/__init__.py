"""Requests: what is combined, over which tensors, and how it is written.

It promises that command line, YAML and Python meet the same rules, and that a recipe is whole when
it exists. It must not know how anything is computed or printed. Read: words, weights,
directions, method_rules, stored_rules, recipe, options, values, yaml, adapted, unwrap, sources,
remade, own_methods, mergekit, files, sweep.
"""
