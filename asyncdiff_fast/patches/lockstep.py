"""All patches of a denoiser in one process, by turns: what patches together give is known without any other rank.

Each patch has a thread, but only one of them runs at a time, until it waits for what another has not sent yet.
"""

import threading


class _Given:
    """The exchange of one patch among those of a `Lockstep`, in the parts that synchronous calls use."""

    def __init__(self, turns, number):
        self._turns, self._number, self._made, self._posts = turns, number, 0, {}

    def slot(self, name, sends, recvs, depth):
        """(number, sends, receives)."""
        self._made += 1
        return self._made, tuple(sends), tuple(recvs)

    def freeze(self, phase, numbers=None):
        """Slots are not compared."""

    def release(self, phase):
        """Nothing is held."""

    def post(self, slot):
        """What the others receive is copied."""
        number, sends, _ = slot
        epoch = self._posts[number] = self._posts.get(number, -1) + 1
        for i, send in enumerate(sends):
            ordinal = sum(other.peer == send.peer for other in sends[:i])
            self._turns.mail[number, epoch, self._number, send.peer, ordinal] = send.buffers[0].clone()

    def wait(self, slot):
        """Lets the other patches run until they have sent."""
        number, _, recvs = slot
        for i, recv in enumerate(recvs):
            ordinal = sum(other.peer == recv.peer for other in recvs[:i])
            key = (number, self._posts[number], recv.peer, self._number, ordinal)
            recv.buffers[0].copy_(self._turns.take(self._number, key))


class Lockstep:
    """Turns of `size` patches; `resume(number)` is called whenever a patch goes on."""

    def __init__(self, size, resume):
        self.mail, self.exchanges = {}, [_Given(self, number) for number in range(size)]
        self._resume, self._turn, self._changed, self._errors = resume, 0, threading.Condition(), []
        self._running = set()

    def run(self, call):
        """[`call(number)` of every patch]. Raises what the first of them raised."""
        numbers = range(len(self.exchanges))
        results, self._errors, self._turn, self._running = [None] * len(numbers), [], 0, set(numbers)
        self.mail.clear()

        def one(number):
            try:
                self._come(number)
                results[number] = call(number)
            except BaseException as error:
                self._errors.append(error)
            finally:
                with self._changed:
                    self._running.discard(number)
                    self._pass_on(number)

        threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return results

    def take(self, number, key):
        """What was sent under a key."""
        while key not in self.mail:
            if self._errors or self._running == {number}:
                raise RuntimeError("another patch did not send what this one waits for")
            with self._changed:
                self._pass_on(number)
            self._come(number)
        return self.mail.pop(key)

    def _pass_on(self, number):
        later = [n for n in sorted(self._running) if n > number] or sorted(self._running)
        self._turn = later[0] if later else -1
        self._changed.notify_all()

    def _come(self, number):
        with self._changed:
            self._changed.wait_for(lambda: self._turn == number)
        self._resume(number)
