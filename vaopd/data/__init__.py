"""Data sets, from files to a run's problems; and the generated handwritten geometry.

tables.py ──► records.py ──► loaders.py ──► measures.py ──► problems.py
files, rows   one record     prompts        lengths         a run's training and held-out problems
"""
