"""``python -m vmonty`` is the command ``vmonty``."""

from vmonty.cli.main import main

main()
