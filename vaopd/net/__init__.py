"""Ports that this host can listen on, and the delays between a client's attempts. Standard library only."""
