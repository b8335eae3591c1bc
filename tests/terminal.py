"""A command on a pseudo-terminal, and what a person would see there: the screen, what has scrolled off, every frame."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import termios
import threading

import pyte

HEIGHT = 30


class Terminal(io.StringIO):
    """Output of this process that says it is a terminal."""

    def isatty(self):
        return True


class Session:
    """A process whose input, output and errors are a terminal of the given width."""

    def __init__(self, command, width, **options):
        self.width, self.stream = width, b""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, width, 0, 0))
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        environment |= {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **streams, **options)
        os.close(slave)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        try:
            while data := os.read(self._master, 1 << 16):
                self.stream += data
        except OSError:  # the terminal was hung up, because the last process has gone
            pass
        os.close(self._master)

    def finish(self):
        """Wait for the end; return the status."""
        self._reader.join()
        return self.process.wait()

    def frames(self):
        """The rows on screen whenever a line was complete, or is about to be drawn over."""
        screen = pyte.Screen(self.width, HEIGHT)
        feed = pyte.ByteStream(screen).feed
        for part in self.stream.split(b"\r"):
            feed(part)
            yield list(screen.display)
            feed(b"\r")

    def text(self):
        """All that can be read at the end: rows as wide as the terminal, scrolled-off ones first."""
        screen = pyte.HistoryScreen(self.width, HEIGHT, history=100_000)
        pyte.ByteStream(screen).feed(self.stream)
        above = ["".join(row[column].data for column in range(self.width)) for row in screen.history.top]
        return [*above, *screen.display]
