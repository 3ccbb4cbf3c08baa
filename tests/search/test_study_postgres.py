"""Studies in a real PostgreSQL server, which the test starts and stops."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from toy_study import SMALL, WIDE, Measure, check_shared, measured, setting_of, start_worker, told, tpe

from fewstep.samplers import InputError
from fewstep.search.study import StudySetting, run_study


def programs():
    """The folder of Debian's newest PostgreSQL programs, or the one on the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    found = str(folders[-1]) if folders else shutil.which("initdb")
    return Path(found).parent if found else None


def other_user():
    """Arguments that let a program run as another user, which initdb wants of root."""
    if os.getuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


@pytest.fixture(scope="module")
def server():
    """URL of a server of this test's own, on a free port of this machine."""
    if programs() is None:
        pytest.skip("the programs of PostgreSQL are not installed (Debian: apt-get install postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("the driver psycopg is not installed (pip install 'fewstep[postgres]')")
    user = other_user()
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a short path: it holds the server's socket
    if user:
        os.chown(folder, user["user"], user["group"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(program, *arguments):
        command = [programs() / program, "-D", folder / "data", *arguments]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **user, timeout=120
        )
        assert done.returncode == 0, done.stderr.decode()

    run("initdb", "-U", "fewstep", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    try:
        run("pg_ctl", "-w", "-l", folder / "log", "-o", options, "start")
        yield f"postgresql+psycopg://fewstep@127.0.0.1:{port}/postgres"
        run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def test_two_workers_measure_each_plan_once(server, tmp_path):
    log = tmp_path / "log"
    arguments = (setting_of(tmp_path, 20, storage=server, name="shared"), SMALL, Measure(log, 0.02), tpe)
    workers = [start_worker(*arguments) for _ in range(2)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    check_shared(log, run_study(*arguments), 20)


def test_a_study_is_the_same_as_in_sqlite_also_after_a_kill(server, tmp_path):
    log = tmp_path / "log"
    slow = start_worker(setting_of(tmp_path, 8, storage=server, name="same"), WIDE, Measure(log, 0.3), tpe)
    while not log.exists() or len(measured(log)) < 4:
        time.sleep(0.02)
    slow.kill()
    slow.join()
    study = run_study(setting_of(tmp_path, 8, storage=server, name="same"), WIDE, Measure(log), tpe)
    lite = run_study(setting_of(tmp_path, 8, name="same"), WIDE, Measure(tmp_path / "other"), tpe)
    assert told(study) == told(lite)


def test_the_driver_is_added_to_a_plain_url(server, tmp_path):
    plain = server.replace("+psycopg", "")
    study = run_study(setting_of(tmp_path, 1, storage=plain, name="plain"), SMALL, Measure(tmp_path / "log"), tpe)
    assert len(study.trials) == 1


def test_a_database_that_is_not_there_is_refused(server):
    setting = StudySetting(server.replace("/postgres", "/nothing"), "toy", {}, trials=1, seed=0)
    with pytest.raises(InputError, match=r'cannot open the study.* database "nothing" does not exist'):
        run_study(setting, SMALL, None, tpe)
