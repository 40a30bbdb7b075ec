"""`detlearn` on a terminal that waits: it shows the first line that begins with $WAIT_AT, and nothing goes on until the run is asked to stop.

A signal that is sent when that line is seen comes in that very iteration, however slow or busy the machine is. A run that `torchrun`
has started again does not wait.
"""
import os, sys, time
from detlearn.apis.cli import main


class Terminal:
    "Standard output that may wait."
    def __init__(self, out, at): self.out, self.at, self.seen = out, at, False

    def write(self, text):
        if 'finishing this iteration' in text: self.at = None  # the signal has been heard
        n = self.out.write(text); self.out.flush()
        self.seen = self.seen or bool(self.at) and text.startswith(self.at)
        while self.seen and self.at and text.endswith('\n'): time.sleep(.01)
        return n

    def __getattr__(self, name): return getattr(self.out, name)


if __name__ == '__main__':
    if os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
        sys.stdout = Terminal(sys.stdout, os.environ['WAIT_AT'])
    sys.exit(main())
