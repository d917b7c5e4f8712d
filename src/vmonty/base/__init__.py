"""Ground floor: errors, layouts, guest RAM. Imports nothing of vmonty above it."""
