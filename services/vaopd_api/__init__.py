"""The scoring API over HTTP, with its viewer page and the runs' reports."""
