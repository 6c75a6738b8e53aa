"""Addresses that this host can listen on. Standard library only."""
