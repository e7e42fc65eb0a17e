"""The tests of two or more files run side by side, one process for each core.

One thread for every process: the tensors are tiny, and threads would mostly wait for each other. The
processes are forks of the one that has collected the tests, each takes the next file until none is left, and
what they report is shown as if one process had run them all.
"""
import json
import multiprocessing
import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
import torch  # noqa: E402

# They take half a minute or more. Begun last, they would leave the other cores idle at the end.
LONGEST = {"test_crash", "test_processes", "test_train", "test_dp_sgd", "test_edits", "test_course",
           "test_devices", "test_bench", "test_original_weights", "test_faces", "test_accountant"}


# Tests that need a process of their own fork it from a server that has imported all this once. (Optimizers
# import torch's compiler at their first call.)
multiprocessing.set_forkserver_preload(["train", "torch._dynamo", "torchvision.utils", "scipy.interpolate"])


def run_files(session, files, counter, pipe, folder):
    """A child: run one file of tests after the other; write each report into the pipe as a line of JSON."""
    config = session.config
    manager = config.pluginmanager
    capture = manager.getplugin("capturemanager")
    capture.stop_global_capturing()  # its temporary files belong to all processes: take some of our own
    capture.start_global_capturing()
    reporter = manager.unregister(name="terminalreporter")
    folder.mkdir()
    config._tmp_path_factory._basetemp = folder

    class Sender:
        _tw = reporter._tw  # asked for the width and colours of what is said of a failure

        @staticmethod
        def pytest_runtest_logreport(report):
            entry = config.hook.pytest_report_to_serializable(config=config, report=report)
            with counter.get_lock():  # long lines would not arrive whole
                pipe.write(json.dumps(entry) + "\n")
                pipe.flush()

    manager.register(Sender, "terminalreporter")
    while True:
        with counter.get_lock():
            number, counter.value = counter.value, counter.value + 1
        if number >= len(files):
            return
        for item, following in zip(files[number], [*files[number][1:], None], strict=True):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    files = {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if torch.get_num_threads() > 1:  # a fork of a process with a pool of threads may wait for them forever
        cores = 1
    options = session.config.option
    if min(cores, len(files)) < 2 or session.testsfailed or options.collectonly or options.usepdb:
        return None  # pytest's own loop
    counter, base = multiprocessing.Value("i", 0), session.config._tmp_path_factory.getbasetemp()
    order = sorted(files, key=lambda path: (path.stem not in LONGEST, -len(files[path])))
    order, missing, children = [files[path] for path in order], len(session.items), []
    read, write = os.pipe()
    for number in range(cores):
        if not (child := os.fork()):
            status = 1
            try:
                with open(write, "w") as pipe:
                    run_files(session, order, counter, pipe, base / f"core{number}")
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    os.close(write)
    hook = session.config.hook
    try:
        with open(read) as lines:
            for line in lines:
                report = hook.pytest_report_from_serializable(config=session.config, data=json.loads(line))
                if report.when == "setup":
                    hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
                hook.pytest_runtest_logreport(report=report)
                if report.when == "teardown":
                    hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
                    missing -= 1
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
        if missing:
            raise session.Failed(f"a process of the tests died; {missing} tests have not ended")
    finally:
        for child in children:
            if missing:
                os.kill(child, 9)
            os.waitpid(child, 0)
    return True
