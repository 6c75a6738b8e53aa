"""Prompts: the generated handwritten geometry, and loaders for Geometry3K, ViRL39K and your own data."""
