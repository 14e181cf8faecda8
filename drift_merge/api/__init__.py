"""The Python face: what the two commands do, as functions. Progress by tqdm, no printing.

    import drift_merge

    alignment = drift_merge.align("org/reasoner", "org/mllm")
    prior = drift_merge.compute("org/reasoner", "org/mllm", "prior/")
    merge = drift_merge.merge("ties", ["org/reasoner"], "org/mllm", "merged/", base="org/base")

Options that several share (`**how`) are those of the command line by their Python names; they are
listed in each function's signature and docstring, from the table that the commands use.

It promises what the commands promise; it must know nothing of terminals. Read: options, priors,
merges, searches.
"""
