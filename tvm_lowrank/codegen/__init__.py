"""How does a Relax function become fast code? The entry points are `lower.lower` and `lower.build`."""
