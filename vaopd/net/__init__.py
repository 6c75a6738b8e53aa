"""Ports that this host can listen on, the delays between a client's attempts, an event loop for code without one."""
