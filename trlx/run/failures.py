"""When a run ends early: what is saved, what its last lines say, and whose frames the traceback shows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from trlx import checkpoint, logging
from trlx.backends.distress import Interrupted, is_shared, report, shared, watching
from trlx.run import Run
from trlx.tracebacks import short_errors

logger = logging.get_logger(__name__)

EXIT_REQUEUE = 75
"""Exit code after a save on request (EX_TEMPFAIL of sysexits.h): start again to go on."""

F = TypeVar("F", bound=Callable)


@contextmanager
def rescuing(trainer: Run) -> Iterator[None]:
    """Saves what was trained when the block ends early, where that is possible, and says how to go on.

    Raises:
        SystemExit: with code 75, after SIGTERM or SIGUSR1.
        KeyboardInterrupt: after Ctrl-C.
        BaseException: any other error of the block as it is, with a note.
    """
    first_step = trainer.schedule.step
    try:
        yield
    except Interrupted as asked:
        told = f"Stopped at step {trainer.schedule.step} by {asked}. {_save(trainer, asked, first_step)}"
        if str(asked) == "SIGINT":
            raise _noted(shared(KeyboardInterrupt()), told) from None
        logger.warning(told)
        raise shared(SystemExit(EXIT_REQUEUE)) from None
    except BaseException as error:
        told = _save(trainer, error, first_step)
        if isinstance(error, SystemExit):  # Python ends without a word of it
            logger.warning(f"sys.exit({error.code!r}) was called at step {trainer.schedule.step}. {told}")
        report(_noted(error, told))
        raise


def for_users(fn: F) -> F:
    """A function that users call: its errors reach all processes of the job, and those that are meant for the user come
    without frames of this package, see `trlx.tracebacks`."""

    @short_errors
    @functools.wraps(fn)
    def called(*args, **kwargs):
        with watching():
            return fn(*args, **kwargs)

    return called


def _save(trainer: Run, error: BaseException, first_step: int) -> str:
    """Writes a checkpoint where there is something to save and all processes can. Says what there is to go on from."""
    step = trainer.schedule.step
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
        except Exception as failure:  # on one process, while the others wait for it
            report(_noted(failure, f"Step {step} is not saved. {_how_to_go_on(trainer)}"))
            raise
        return _how_to_go_on(trainer)
    return f"Step {step} is not saved: {why}. {_how_to_go_on(trainer)}"


def _passed_over(trainer: Run) -> str:
    """Takes back the last checkpoint if since then no step has changed the weights, which are those of no use."""
    if trainer.saved is None or trainer.saved[1] < trainer.schedule.step - trainer.skipped.in_a_row:
        return ""
    folder = trainer.saved[0]
    older = [path for path in checkpoint.checkpoints(folder.parent) if path.name < folder.name]
    trainer.saved = (older[-1], checkpoint.step_of(older[-1])) if older else None
    return f", nor are those of {folder}, which are the same"


def _how_to_go_on(trainer: Run) -> str:
    if trainer.saved is None:
        return "There is no checkpoint yet"
    folder, step = trainer.saved
    setting = "auto" if folder == checkpoint.newest(trainer.config.train.checkpoint_dir) else folder
    return (
        f"The last checkpoint is {folder}, of step {step}; to go on from there: train.resume_from_checkpoint={setting}"
    )


def _noted(error: BaseException, note: str) -> BaseException:
    error.add_note(note)
    return error
