"""The demo: what a cluster saves, shown and checked."""
