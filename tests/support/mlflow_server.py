"""A real `mlflow server`, a connection to it that can be cut, and helpers that read what it stores."""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from mlflow import MlflowClient

from dskd.config import Config
from dskd.distributed.rendezvous import free_port
from dskd.tracking import Start

SAME = Start(recipe="the same")


class Server:
    """An MLflow server on its own port, which begins with a copy of a database without runs."""

    def __init__(self, folder, no_runs):
        self.folder, self.port, self.process = folder, free_port(), None
        shutil.copyfile(no_runs, folder / "server.db")
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for _ in range(1800):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.1)
        self.stop()
        pytest.fail("the MLflow server did not start")

    def stop(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
            self.process = None


class Link:
    """A connection to a server that can be cut and restored; while it is cut, connections are refused."""

    def __init__(self, server):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._server = ("127.0.0.1", server.port)
        self._listener = None
        self._open = []

    def mend(self):
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self):
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for end in self._open:
            end.close()
        self._open.clear()

    def _accept(self, listener):
        try:
            while True:
                ends = [listener.accept()[0], socket.create_connection(self._server)]
                for end in ends:
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open += ends
                threading.Thread(target=self._forward, args=ends, daemon=True).start()
        except OSError:  # it was cut
            return

    def _forward(self, one, other):
        try:
            while True:
                for ready in select.select([one, other], [], [])[0]:
                    if not (data := ready.recv(65536)):
                        return
                    (other if ready is one else one).sendall(data)
        except (OSError, ValueError):
            return
        finally:
            one.close()
            other.close()


def tracking_config(tmp_path, **tracking):
    tracking = {"system_metrics": False, **tracking}
    return Config(workdir=str(tmp_path), teacher={"path": "a/b"}, tracking=tracking)


def points(uri, run_id, metric):
    """Returns (step, value) of a metric, in the order in which MLflow received them."""
    points = MlflowClient(uri).get_metric_history(run_id, metric)
    return [(point.step, point.value) for point in sorted(points, key=lambda point: point.timestamp)]


def wait_for(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
