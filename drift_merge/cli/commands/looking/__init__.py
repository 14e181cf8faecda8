"""The commands that show instead of making: comparisons and pages.

They promise to write nothing but the page and the picture that they name. They must not know how
a page is drawn. Read: compare, report.
"""
