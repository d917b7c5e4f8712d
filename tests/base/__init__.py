"""Widths, layouts, guest RAM, errors."""
