"""The commands, a file for each verb.

It promises that a command is imported when it is called, and that help never waits for torch. It
must not know formulas or files. Read: guide, doctor, pull, align, compute, inspect, methods,
verify, apply, compress, push, run, sweep, evaluating, train, demo.
"""
