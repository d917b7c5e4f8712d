# Compiled code only has anything to call here.
