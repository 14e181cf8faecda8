"""Searches: the options of a recipe varied, each merge made, evaluated and removed, the best kept.

It promises that a study goes on after anything: a failing trial is recorded, a killed process
leaves nothing that the next cannot do again, and several processes share one study. It must not
know how a command line looks, nor what an evaluation does. Optuna chooses the values and keeps the
journal. Read: parameters, spaces, workers, storages, selection, study, results, targets, patching,
nulls, request, finish, run, start, pages.
"""
