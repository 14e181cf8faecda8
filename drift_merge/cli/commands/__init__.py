"""The commands, a file for each verb.

It promises that a command is imported when it is called, and that help never waits for torch. It
must not know formulas or files. Read: guide, doctor, pull, looking, align, compute, inspect,
methods, verify, apply, compress, deriving, push, run, sweep, evaluating, train, demo.
"""
