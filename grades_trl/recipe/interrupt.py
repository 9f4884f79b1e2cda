"""SIGTERM and Ctrl-C: training ends after the step under way, with a checkpoint. A second one ends the process."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from grades_trl.distributed import in_any
from grades_trl.recipe.bad_input import printable
from grades_trl.recipe.comparison import split_flags
from grades_trl.recipe.places import this_command
from grades_trl.recipe.record import public_argv

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EndOnSignal(TrainerCallback):
    """
    Ends a run after the step in which the process is asked to end. Add it as the last callback.

    ```python
    ending = EndOnSignal(trainer)
    trainer.add_callback(ending)
    with ending.handlers():
        trainer.train()
    ending.exit_if_asked()
    ```

    Attributes:
        received (`signal.Signals` or `None`): the first signal.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._ends = False
        self.received: signal.Signals | None = None

    @contextmanager
    def handlers(self) -> Iterator[None]:
        """Takes SIGTERM and SIGINT until the first one of them has come, or the block ends. Signals that are ignored
        stay so. Python lets only its main thread do this; in another one, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
        process = os.getpid()

        def put_back() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def receive(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a worker, before it ignores signals
                return
            self.received = signal.Signals(number)
            put_back()  # a second one does what it always does
            said = f"\n{self.received.name}: training ends after this step. A second signal ends it at once.\n"
            os.write(2, said.encode())  # print() may be what it has interrupted

        try:
            for number in before:
                signal.signal(number, receive)
            with self._workers_outlive_signals():
                yield
        finally:
            put_back()

    def exit_if_asked(self) -> None:
        """
        Raises:
            SystemExit: a signal has come; after where everything is, and how to go on. The code is the shell's for
                that signal, so that a scheduler does not take the run for a finished one.
        """
        if self.received is None and not self._ends:
            return
        args, state = self._trainer.args, self._trainer.state
        received = self.received or signal.SIGTERM  # of another process
        _, flags = split_flags(public_argv()[1:], ("resume", "resume_from_checkpoint"))
        command = shlex.join([*this_command(), *flags, "--resume", "auto"])
        lines = [f"\n{received.name} has ended the run after step {state.global_step} of {state.max_steps}."]
        if self._ends:
            lines.append(f"checkpoint {Path(args.output_dir) / f'checkpoint-{state.global_step}'}")
        lines.append(f"model      {args.output_dir} (not scored)")
        if getattr(self._trainer, "grades_summary", None) is not None:
            lines.append(f"report     {Path(args.output_dir) / 'grades' / 'report.html'}")
        print(printable("\n".join([*lines, "", f"Resume it:\n  {command}"])), flush=True)
        self._trainer.accelerator.wait_for_everyone()  # torchrun kills all processes when one of them has ended
        raise SystemExit(128 + received)

    @contextmanager
    def _workers_outlive_signals(self) -> Iterator[None]:
        """Ctrl-C and schedulers send their signal to all processes, and a worker that ends would end the run: those of
        training and those of evaluation. When the block ends they are told to end, since `terminate()` at the exit of
        the main process is a signal too, and it would wait for them for ever."""
        trainer = self._trainer
        own = trainer._get_dataloader
        iterators: weakref.WeakSet[Any] = weakref.WeakSet()

        def remembered(get_iterator: Callable[[], Any]) -> Any:
            iterator = get_iterator()
            iterators.add(iterator)
            return iterator

        def get(*args: Any, **kwargs: Any) -> Any:
            prepared = own(*args, **kwargs)
            loader = getattr(prepared, "base_dataloader", prepared)  # in accelerate's
            loader.worker_init_fn = functools.partial(_begin_worker, loader.worker_init_fn)
            loader._get_iterator = functools.partial(remembered, loader._get_iterator)
            return prepared

        trainer._get_dataloader = get
        try:
            yield
        finally:
            del trainer._get_dataloader
            for iterator in iterators:  # persistent ones, and those of a run that has failed
                if hasattr(iterator, "_shutdown_workers"):  # of a loader with processes
                    iterator._shutdown_workers()

    def on_step_end(self, args, state, control, **kwargs):
        asked = in_any(self.received is not None, args.device)  # they must end in the same step
        if asked and not control.should_training_stop:
            self._ends = control.should_save = True
            args.save_only_model = False  # nothing could be resumed

    def on_save(self, args, state, control, **kwargs):
        if self._ends:  # not before: the checkpoint would say that the run has ended
            self._trainer.interrupted = control.should_training_stop = True
            args.save_total_limit = None  # 1 would delete this checkpoint where another one is the best

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._ends:  # the epoch has not ended: what comes at its end is not due
            control.should_log = control.should_evaluate = control.should_save = False


def _begin_worker(own: Callable[[int], None] | None, worker: int) -> None:
    """What a process of the data loader runs first. It ends with the main process, which it looks for."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if own is not None:
        own(worker)
