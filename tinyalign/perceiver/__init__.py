"""perceiver."""
