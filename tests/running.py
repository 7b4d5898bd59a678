"""The command line as users run it, without paying seconds of imports for every command.

One process imports everything once and forks for each command: the child is a process of its own, with its own
arguments, working directory, standard streams and exit code, and may be killed. `plant` is Python code that the child
runs first: where a test needs a full disk or a kill at one exact call, it plants it there, and the package itself
knows nothing of tests.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from places import ROOT

# Every call that changes what is on the disk under a name; `at` is the number of the one that never happens.
KILL = """
import os, shutil
def _kill_before(at, log=None):
    made = []
    def watched(module, name):
        real = getattr(module, name)
        def call(*arguments, **keywords):
            made.append(name)
            if log:
                with open(log, "a") as file:
                    shown = [str(a).rsplit("/", 2)[-2:] for a in arguments if not isinstance(a, int)]
                    file.write(name + " " + " ".join("/".join(s) for s in shown) + chr(10))
            if len(made) == at:
                os.kill(os.getpid(), 9)
            return real(*arguments, **keywords)
        setattr(module, name, call)
    for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir"):
        watched(os, name)
    watched(shutil, "rmtree")
"""


@dataclass(frozen=True)
class Ran:
    """What a command did: exit code (negative: the signal that ended it) and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of an error."""
        assert self.err.startswith("moe-compress: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n"), self.err
        assert "Traceback" not in self.out
        return self.err.removesuffix("\n")


class Commands:
    """Starts commands. Use as a context manager."""

    def __enter__(self) -> "Commands":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._folder = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._folder.cleanup()

    def __call__(
        self,
        *arguments: object,
        cwd: Path = ROOT,
        plant: str = "",
        environment: dict | None = None,
        interrupt: str = "",
    ) -> Ran:
        """Run `moe-compress ARGUMENTS`. `interrupt`: send SIGINT once this file exists."""
        job = {
            "arguments": [str(a) for a in arguments],
            "cwd": str(cwd),
            "plant": plant,
            "environment": environment or {},
            "streams": [str(Path(self._folder.name) / name) for name in ("out", "err")],
        }
        print(json.dumps(job), file=self._server.stdin, flush=True)
        child = int(self._server.stdout.readline())
        if interrupt:
            deadline = time.monotonic() + 60
            while not Path(interrupt).exists() and time.monotonic() < deadline:
                time.sleep(0.005)
            os.kill(child, signal.SIGINT)
        code = int(self._server.stdout.readline())
        out, err = (Path(stream).read_text() for stream in job["streams"])
        return Ran(code, out, err)


def python(*arguments: object) -> str:
    """What a fresh interpreter prints; modules of tests can be imported there."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT / "tests",
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def digest(folder: Path) -> dict[str, str]:
    """Every file of a folder → SHA-256; folders have none."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def _child(job: dict) -> int:
    """Be the command. Returns its exit code as the interpreter would."""
    os.setpgid(0, 0)
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, stream in enumerate(job["streams"], 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
    sys.argv = ["moe-compress", *job["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(job["plant"], {"__name__": "planted"})
    from moe_compress.cli import main

    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def _serve() -> None:
    import moe_compress.cli.main
    import moe_compress.passes
    from moe_compress.cli.show import inspected

    # One thread by OMP_NUM_THREADS: torch.set_num_threads would start a pool here, which no child inherits whole.
    moe_compress.passes.all_passes()
    inspected(
        str(ROOT / "demo" / "moe-demo")
    )  # transformers builds tables and imports a family when they are first used
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _child(json.loads(line))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
