"""The command ``vmonty``, also as ``python -m vmonty``."""

import gc
import signal


def start() -> None:
    """Run it. Whoever interrupts it before it has begun ends it, and sees nothing of what it was importing."""
    gc.disable()  # see cli.main
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vmonty.cli.main import main

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()


if __name__ == "__main__":
    start()
