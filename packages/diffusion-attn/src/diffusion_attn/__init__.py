"""Faster and steerable attention for image and video diffusion, in diffusers."""
