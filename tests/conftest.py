"""One thread for the tests, their subprocesses included: the tensors are tiny, and two threads wait for each other more than
they compute (a third of the suite's time on two cores, several times that on a busy machine)."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
