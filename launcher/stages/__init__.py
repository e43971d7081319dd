"""The stage kinds: what a config reads and makes, and the steps that do it."""
