"""Crop yield from satellite imagery; see README.md."""
