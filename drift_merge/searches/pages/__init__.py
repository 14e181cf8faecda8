"""The page of a search as plain data, made of its `search.json`.

It promises that every number on the page is one of that file. It must not know how a page is drawn,
nor need Optuna. Read: charts, commands, winner, page.
"""
