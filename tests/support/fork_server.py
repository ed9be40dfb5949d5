"""Runs of the example's scripts in forks of one process that has imported all they need, which saves seconds a run.

Reads jobs as JSON lines (script, argv, cwd, env, output, most bytes a file) and writes the exit status of each.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from conftest import EXAMPLE, ROOT, RUNTIME, child_environment

SCRIPTS = ("train_colocate", "eval_mmau", "avqa")
HEAVY = ("audio_dataset", "datasets", "deepspeed", "lightrft.strategy", "lightrft.trainer.spmd_ppo_trainer")


class ForkServer:
    """The process, from the test's side.

    :param imports: Modules to import beforehand, beside the scripts.
    """

    def __init__(self, imports: tuple[str, ...] = ()) -> None:
        folders = (EXAMPLE, EXAMPLE / "data_preprocess", RUNTIME, ROOT / "tests")
        environment = child_environment() | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
        command = [sys.executable, "-m", "support.fork_server", *imports]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def run(self, script: str, argv: list, cwd: Path, env: dict | None = None, most: int = -1) -> tuple[int, str]:
        """Exit status and all output of ``python script argv``.

        :param env: Further environment variables.
        :param most: Bytes that no file may exceed, as if the disk were full; -1: any.
        """
        job = {"script": script, "argv": list(map(str, argv)), "cwd": str(cwd), "env": env or {}, "most": most}
        output = cwd / "output.txt"
        self._process.stdin.write(json.dumps(job | {"output": str(output)}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline()), output.read_text(errors="replace")

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Fork for each job; a fork leaves this function and runs the script to its end, as Python itself would."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints when it is imported
    modules = {name: __import__(name) for name in (*SCRIPTS, *sys.argv[1:])}
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid:
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
            continue
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        sys.argv = [job["script"], *job["argv"]]
        if job["most"] >= 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["most"], job["most"]))
        sys.exit(modules[job["script"].removesuffix(".py")].main())


if __name__ == "__main__":
    main()
