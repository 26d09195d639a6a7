"""Attention and token operations; see README.md."""
