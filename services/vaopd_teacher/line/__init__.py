"""Decides which prepared groups the device takes next."""
