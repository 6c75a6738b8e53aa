"""Visual-Advantage On-Policy Distillation (arXiv 2605.21924): one shared teacher, many student jobs.

Importing this package loads nothing heavy; `vaopd.client` and `vaopd.types` work without torch.
"""

__version__ = "0.1.0"
