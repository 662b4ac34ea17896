"""Ctrl-C while something must not be left half-done."""

import os
import signal
import threading

import pytest

from hooklens.training.keeping.interrupts import hold_interrupts


@pytest.fixture(autouse=True)
def plain_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_is_noted_and_the_second_acts() -> None:
    with hold_interrupts() as interrupts:
        press()
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_somebodys_own_stays() -> None:
    pressed = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    with hold_interrupts() as interrupts:
        press()
    assert pressed == [signal.SIGINT]
    assert not interrupts.asked


def test_in_another_thread_nothing_changes() -> None:
    found = []

    def run() -> None:
        with hold_interrupts() as interrupts:
            found.append((interrupts.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(False, signal.default_int_handler)]
