"""When a run ends early: what it saves, what its last lines say, and which frames the traceback shows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from trlx import checkpoint, logging
from trlx.backends.distress import Interrupted, is_shared, report, shared, watching
from trlx.run import Trainer
from trlx.tracebacks import short_errors

logger = logging.get_logger(__name__)

EXIT_REQUEUE = 75
"""Exit code after a signal made the run save and stop (EX_TEMPFAIL of sysexits.h): start it again to go on."""

F = TypeVar("F", bound=Callable)


@contextmanager
def rescuing(trainer: Trainer) -> Iterator[None]:
    """If the block ends early, saves a checkpoint where that is possible, and says how to go on.

    Raises:
        SystemExit: with code 75, after SIGTERM or SIGUSR1.
        KeyboardInterrupt: after Ctrl-C.
        BaseException: any other error of the block, with a note.
    """
    first_step = trainer.schedule.step
    try:
        yield
    except Interrupted as asked:
        told = f"Stopped at step {trainer.schedule.step} by {asked}. {_save(trainer, asked, first_step)}"
        if str(asked) == "SIGINT":
            stopped = KeyboardInterrupt()
            stopped.add_note(told)
            raise shared(stopped) from None
        logger.warning(told)
        raise shared(SystemExit(EXIT_REQUEUE)) from None
    except BaseException as error:
        told = _save(trainer, error, first_step)
        if isinstance(error, SystemExit):  # Python prints nothing about it
            logger.warning(f"sys.exit({error.code!r}) was called at step {trainer.schedule.step}. {told}")
        error.add_note(told)
        report(error)
        raise


def for_users(fn: F) -> F:
    """Decorates a function that users call: all processes of the job hear of its errors, and errors about what the user
    wrote show no frames of this package, see `trlx.tracebacks`."""

    @short_errors
    @functools.wraps(fn)
    def called(*args, **kwargs):
        with watching():
            return fn(*args, **kwargs)

    return called


def _save(trainer: Trainer, error: BaseException, first_step: int) -> str:
    """Saves a checkpoint if there are new steps and all processes can save. Returns a sentence on how to go on."""
    step = trainer.schedule.step
    try:  # of the checkpoint that is being written
        trainer.saver.finish() if is_shared(error) else trainer.saver.wait()
    except Exception as failure:
        logger.warning(f"The last checkpoint could not be written: {failure}")
    if step == first_step or (trainer.saved is not None and trainer.saved[1] == step):
        return _how_to_go_on(trainer)
    if isinstance(error, KeyboardInterrupt):
        why = "stopped at once"
    elif not trainer.at_boundary:
        why = "the error came in the middle of an update"
    elif isinstance(error, FloatingPointError):
        why = f"its weights are of no use{_passed_over(trainer)}"
    elif not is_shared(error):
        why = "the error is not on all processes, which save together"
    else:
        try:
            trainer.save()
        except Exception as failure:  # this process tells the others, which wait for it
            failure.add_note(f"Step {step} is not saved. {_how_to_go_on(trainer)}")
            report(failure)
            raise
        return _how_to_go_on(trainer)
    return f"Step {step} is not saved: {why}. {_how_to_go_on(trainer)}"


def _passed_over(trainer: Trainer) -> str:
    """If no step since the last checkpoint changed the weights, sets ``trainer.saved`` to the checkpoint before it."""
    if trainer.saved is None or trainer.saved[1] < trainer.schedule.step - trainer.guards.in_a_row:
        return ""
    folder, last = trainer.saved
    steps = [(path, checkpoint.step_of(path)) for path in checkpoint.checkpoints(folder.parent)]
    trainer.saved = next(((path, step) for path, step in reversed(steps) if step < last), None)
    return f", nor are those of {folder}, which are the same"


def _how_to_go_on(trainer: Trainer) -> str:
    if trainer.saved is None:
        return "There is no checkpoint yet"
    folder, step = trainer.saved
    setting = "auto" if folder == checkpoint.newest(trainer.config.train.checkpoint_dir) else folder
    return (
        f"The last checkpoint is {folder}, of step {step}; to go on from there: train.resume_from_checkpoint={setting}"
    )
