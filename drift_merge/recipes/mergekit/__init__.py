"""mergekit's YAML, read as a recipe of ours.

It promises mergekit's formula, or a refusal that names key and line. It must not know how recipes
are checked or run. Read: parameters, document, roles, translate.
"""
