"""Vision transformers that spend less, as ordinary timm models; see README.md."""
