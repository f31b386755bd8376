"""Ctrl-C at a chosen moment, for tests of what it may leave behind."""

import signal


class Interrupts:
    """A timer sends SIGINT, as Ctrl-C does, while armed."""

    def __init__(self):
        self.armed = False

    def handle(self, _signal, _frame):
        if self.armed:
            signal.raise_signal(signal.SIGINT)

    def interrupt(self, moment, work, again=0.0):
        """Works; interrupted after ``moment`` seconds, and every ``again``: whether it was."""
        try:
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, moment, again)
            work()
        except KeyboardInterrupt:
            return True
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False
