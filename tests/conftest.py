"""What all tests share: a Ctrl-C that is not ignored, though a shell may have started them in the background."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
