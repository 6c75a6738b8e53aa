"""A run's folder: records, ledger, checkpoints and policy snapshots, written and read again."""
