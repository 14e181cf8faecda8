"""`drift-prior` and `drift-merge`: parse, call, print.

It promises one answer on stdout, everything else on stderr, and the exit codes of the guide. It
must not have rules of its own: they are the recipe's. Read: entry, render, heat_map, progress,
running, config_file, options, training_options, traffic, planning, answers, commands, prior,
merge.
"""
