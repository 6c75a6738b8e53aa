"""Data sets, from files to a run's problems; and the generated handwritten geometry.

tables.py (files ──► rows) ──► records.py (one record) ──► loaders.py (prompts) ──► measures.py ──► problems.py (a run's)
"""
