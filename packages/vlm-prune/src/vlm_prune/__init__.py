"""Fewer visual tokens in any vision-language model of transformers, by any of the published criteria."""
