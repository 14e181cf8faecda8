"""Pages: what is shown as plain data, and one HTML file of it that loads nothing.

It promises that every number on a page stands in its data. It must not know how a figure is
measured. Read: document, priors, merges, sweeps, runs, page.
"""
