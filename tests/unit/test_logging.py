"""One verbosity for the library, and only the main process speaks."""

from __future__ import annotations

import logging as stdlib
import os
import subprocess
import sys

import pytest

from trlx import logging


@pytest.fixture(autouse=True)
def restored():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()
    logging.reset_format()


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_messages_below_the_verbosity_are_not_shown(caplog):
    logger = logging.get_logger("trlx.somewhere")
    logging.set_verbosity(logging.WARNING)
    logger.info("hidden")
    logger.warning("shown %d", 1)
    logging.set_verbosity("debug")
    logger.debug("shown too")
    assert messages(caplog) == ["shown 1", "shown too"]
    assert logging.get_verbosity() == stdlib.DEBUG


def test_an_unknown_verbosity_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="Unknown verbosity 'loud'. Known: debug, info, warning"):
        logging.set_verbosity("loud")


def test_only_the_main_process_speaks_unless_ranks_are_named(caplog, monkeypatch):
    logger = logging.get_logger("trlx.somewhere")
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        logger.warning("main on %s", rank)
        logger.warning("named on %s", rank, ranks=[0, 2])
        logger.warning("all on %s", rank, ranks=[-1])
    expected = ["main on 0", "named on 0", "all on 0", "all on 1", "named on 2", "all on 2"]
    assert messages(caplog) == expected


def test_a_logger_of_a_user_script_obeys_the_same_verbosity(caplog):
    logging.set_verbosity(logging.ERROR)
    logging.get_logger("my_script").warning("hidden")
    assert messages(caplog) == []


def test_the_line_that_called_is_the_one_reported(caplog):
    logging.get_logger("trlx.somewhere").warning("here")
    assert caplog.records[0].filename == "test_logging.py"


def test_advice_can_be_switched_off(caplog, monkeypatch):
    logger = logging.get_logger("trlx.somewhere")
    logger.warning_advice("try this")
    monkeypatch.setenv("TRLX_NO_ADVISORY_WARNINGS", "1")
    logger.warning_advice("try that")
    assert messages(caplog) == ["try this"]


def test_progress_bars_are_on_until_switched_off():
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    assert not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    assert logging.is_progress_bar_enabled()


def run(code: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "TRLX_VERBOSITY")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**env, **environment}, capture_output=True, text=True, check=True
    ).stderr


SPEAK = "from trlx import logging; log = logging.get_logger('trlx.x'); log.debug('low'); log.info('high')"


def test_without_settings_messages_from_info_on_go_to_stderr():
    assert run(SPEAK) == "[INFO] high\n"


def test_the_first_verbosity_is_read_from_the_environment():
    assert run(SPEAK, TRLX_VERBOSITY="debug") == "[DEBUG] low\n[INFO] high\n"
    assert run(SPEAK, TRLX_VERBOSITY="40") == ""


def test_the_explicit_format_names_file_and_line():
    code = "from trlx import logging; logging.enable_explicit_format(); logging.get_logger('trlx.x').info('high')"
    assert run(code).startswith("[INFO|<string>:1] ")


def test_an_application_that_configured_logging_gets_each_message_once():
    code = f"import logging as l; l.basicConfig(format='app %(message)s'); {SPEAK}"
    assert run(code) == "app high\n"
