"""Computes the log-probs of both views."""
