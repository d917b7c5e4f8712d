"""The block layer."""
