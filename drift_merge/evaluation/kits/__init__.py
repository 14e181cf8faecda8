"""The evaluation kits: which name a model has there, how one is run, which files it leaves.

They promise one call and one reading for each kit. They must not know what is compared, nor import
a kit: it runs in an interpreter of its own. Read: kit, spreadsheets, lmms_eval, vlmevalkit.
"""
