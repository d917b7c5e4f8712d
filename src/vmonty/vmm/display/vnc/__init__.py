"""Remote frame buffer: the screen for VNC viewers."""
