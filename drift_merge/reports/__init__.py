"""Pictures of what a delta is: statistics of two checkpoints, pages, heat maps, PNG files.

It promises numbers that are the manifest's, or measured in one pass over the tensors; a page is
one file that asks for nothing from the network. It must not know the Hub's side of publishing,
training or the command line. Read: places, figures, verdict, histogram, measure, outside, compare,
sources, pages, terminal, pictures, beside.
"""
