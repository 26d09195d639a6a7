"""The doors into diffusers: which layers attend among visual tokens, how a method takes them over, how it is saved."""
