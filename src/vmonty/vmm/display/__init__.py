"""The screen of a machine: what it shows, as pixels and as text, and the VNC server that carries it to viewers."""
