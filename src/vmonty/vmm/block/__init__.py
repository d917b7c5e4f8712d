"""Disks: image formats behind one interface. ``image.open_image`` opens a file, and gives a ``device.BlockDevice``.

Nothing is imported here: a machine's drives know the interface, and the formats are for those who open a file.
"""
